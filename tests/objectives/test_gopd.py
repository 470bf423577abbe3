import pytest
import torch
from torch.testing import assert_close

from hf_rb.objectives.gopd import GOPD, gopd_advantage
from hf_rb.ops.lm_head import Head, lm_head_loss


STUDENT, TEACHER, REFERENCE = (
    torch.tensor(probs).log() for probs in ([0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.6, 0.2, 0.2])
)
# λ: A at each token, M, log Z, KL(q ‖ M), E[-A], expected gradient by the logits
TABLE = {
    0.0: ([0.182322, -0.405465, 0], [0.6, 0.2, 0.2], 0, 0.030479, 0.030479, [-0.106400, 0.112496, -0.006096]),
    1.0: ([-0.916291, 0.847298, -0.693147], [0.2, 0.7, 0.1], 0, 0.342585, 0.342585, [0.286853, -0.356965, 0.070112]),
    1.25: (
        [-1.190944, 1.160489, -0.866434],
        [0.127329, 0.802215, 0.070456],
        0.176894,
        0.597506,
        0.420612,
        [0.385166, -0.474330, 0.089164],
    ),
}


def advantages(scale):
    return gopd_advantage(STUDENT, TEACHER, REFERENCE, scale)


def tiled(tokens, scale, weights=None, **extra):
    """Loss and its gradient by the logits through the tile loop; every token is drawn in the one state above."""
    logits = STUDENT.repeat(len(tokens), 1).requires_grad_()
    given = {
        "labels": torch.tensor(tokens),
        "teacher_logp": TEACHER[tokens],
        "reference_logp": REFERENCE[tokens],
        **extra,
    }
    rule = GOPD(reward_scale=scale, gopd_tis_cap=5.0 if "sampler_logp" in extra else None)
    scored = lm_head_loss(logits, Head(torch.eye(3)), rule, given, weights=weights)
    scored.loss.backward()
    return scored, logits.grad


@pytest.mark.parametrize("scale", TABLE)
def test_worked_table(scale):
    advantage, mixture, log_z, kl, cost, gradient = TABLE[scale]
    q = STUDENT.exp()
    assert_close(advantages(scale), torch.tensor(advantage), atol=1e-6, rtol=0)
    unnormalised = scale * TEACHER + (1 - scale) * REFERENCE
    assert_close(unnormalised.softmax(-1), torch.tensor(mixture), atol=1e-6, rtol=0)
    assert unnormalised.logsumexp(-1) == pytest.approx(log_z, abs=1e-6)
    assert -(q * advantages(scale)).sum() == pytest.approx(cost, abs=1e-6)
    assert cost + log_z == pytest.approx(kl, abs=2e-6)  # E[-A] is no divergence: log Z is missing
    # The average of the sampled gradients is the gradient of KL(q ‖ M).
    assert_close(tiled([0, 1, 2], scale, q)[1].sum(0), torch.tensor(gradient), atol=1e-6, rtol=0)
    logits = STUDENT.clone().requires_grad_()
    log_q = logits.log_softmax(-1)
    divergence = (log_q.exp() * (log_q - unnormalised.log_softmax(-1))).sum()
    assert divergence.item() == pytest.approx(kl, abs=1e-6)
    divergence.backward()
    assert_close(logits.grad, torch.tensor(gradient), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "token, gradient", [(1, [0.580244, -0.812342, 0.232098]), (0, [0.595472, -0.357283, -0.238189])]
)
def test_single_sample(token, gradient):
    scored, grad = tiled([token], 1.25)
    assert scored.loss.item() == pytest.approx(-TABLE[1.25][0][token], abs=1e-6)  # the ratio form
    assert_close(grad[0], torch.tensor(gradient), atol=1e-6, rtol=0)
    logits = STUDENT.clone().requires_grad_()
    (-advantages(1.25)[token] * logits.log_softmax(-1)[token]).backward()  # the form -A log q
    assert_close(grad[0], logits.grad)


@pytest.mark.parametrize("scale, trace", [(1.0, 0.2071), (1.25, 0.3505), (1.5, 0.5326)])
def test_extrapolation_raises_the_variance(scale, trace):
    q = STUDENT.exp()
    gradients = tiled([0, 1, 2], scale)[1]
    mean = (q[:, None] * gradients).sum(0)
    assert (q * (gradients - mean).square().sum(-1)).sum() == pytest.approx(trace, abs=1e-4)


def test_scale_1_is_on_policy_distillation_for_any_reference():
    for reference in (None, REFERENCE, torch.full((3,), torch.nan)):
        assert torch.equal(gopd_advantage(STUDENT, TEACHER, reference, 1.0), TEACHER - STUDENT)


def test_reference_equal_to_the_teacher_cancels_the_scale():
    for scale in (0.0, 0.5, 1.0, 1.25):
        assert_close(gopd_advantage(STUDENT, TEACHER, TEACHER, scale), TEACHER - STUDENT)


def test_at_the_start_the_advantage_is_linear_in_the_scale():
    one = gopd_advantage(REFERENCE, TEACHER, REFERENCE, 1.0)
    assert_close(one, torch.tensor([-1.098612, 1.252763, -0.693147]), atol=1e-6, rtol=0)
    for scale in (0.0, 0.5, 1.25):
        assert_close(gopd_advantage(REFERENCE, TEACHER, REFERENCE, scale), scale * one)


def test_no_gradient_reaches_the_inputs():
    inputs = [logp.clone().requires_grad_() for logp in (STUDENT, TEACHER, REFERENCE)]
    assert not gopd_advantage(*inputs, 1.25).requires_grad


def test_scale_without_a_reference_raises():
    with pytest.raises(ValueError, match="only at 1 does the reference cancel"):
        gopd_advantage(STUDENT, TEACHER, None, 1.25)


def test_truncated_importance_weight():
    sampler = torch.tensor([0.25, 0.05, torch.nan]).log()  # of the last token, the sampler has said nothing
    scored, grad = tiled([1, 1, 1], 1.25, sampler_logp=sampler)
    weight = torch.tensor([1.2, 5.0, 1.0])  # 0.3 / 0.25, 0.3 / 0.05 = 6 truncated
    assert_close(scored.stats["tis_weight"], weight)
    assert_close(scored.stats["loss"], -1.160489 * weight, atol=1e-5, rtol=0)
    assert_close(grad, weight[:, None] * tiled([1], 1.25)[1])
