import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from hf_rb.objectives.gopd import GOPD, GopdFlags, gopd_advantage
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
    given = {"labels": torch.tensor([1, 1, 1]), "teacher_logp": TEACHER[[1, 1, 1]], "sampler_logp": sampler}
    given["reference_logp"] = REFERENCE[[1, 1, 1]]
    dense = GOPD(reward_scale=1.25, gopd_tis_cap=5.0).dense(STUDENT.repeat(3, 1), TEACHER.repeat(3, 1), given)
    assert_close(dense, scored.stats["loss"])


@pytest.mark.parametrize("bound", [0.1, 0.5, 10.0])
def test_clamp_bounds_both_log_ratios(bound):
    rule = GOPD(reward_scale=1.25, gopd_logratio_clamp=bound)
    given = {"labels": torch.arange(3), "teacher_logp": TEACHER, "reference_logp": REFERENCE}
    own, reward = (TEACHER - STUDENT).clamp(-bound, bound), (TEACHER - REFERENCE).clamp(-bound, bound)
    states = STUDENT.repeat(3, 1)
    term = rule(states, None, states, given)
    assert_close(term.loss, -(own + 0.25 * reward))
    assert_close(term.stats["reverse_kl_sampled"], -own)
    assert_close(term.stats["reward"], reward)
    assert_close(term.stats["reference_kl_sampled"], reward - own)
    assert_close(rule.dense(states, states, given), term.loss)


def test_without_reference_nothing_is_said_of_it():
    rule = GOPD()
    term = rule(STUDENT[None], None, STUDENT[None], {"labels": torch.tensor([1]), "teacher_logp": TEACHER[[1]]})
    assert {*term.stats} == {"advantage", "reverse_kl_sampled", "entropy"}
    assert_close(term.stats["entropy"], torch.special.entr(STUDENT.exp()).sum()[None])


@pytest.mark.parametrize(
    "scale, needs, mixture", [(1.0, False, (1.0, 0.0)), (1.25, True, (1.25, -0.25)), (0.0, True, (0.0, 1.0))]
)
def test_objective_of_the_whole_vocabulary_mixes_with_the_scale(scale, needs, mixture):
    keys = {"reward_scale": scale, "gopd_aggregation": "token-mean"}
    full = GOPD.from_config(SimpleNamespace(**DEFAULTS | keys | {"gopd_full_vocab": True}))
    sampled = GOPD.from_config(SimpleNamespace(**DEFAULTS | keys))
    assert full.mixture == mixture and not full.sampled and sampled.sampled
    assert full.needs_reference == sampled.needs_reference == needs
    assert full.aggregation == sampled.aggregation == "token-mean"


DEFAULTS = {field.name: field.default for field in fields(GopdFlags)}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "use_vllm": False}
FINE = [{}, {"min_p": 0.0}, {"reward_scale": 1.25, "reference_model_name_or_path": "r"}, {"gopd_full_vocab": True},
        {"use_vllm": True, "gopd_tis_cap": 5.0}, {"gopd_logratio_clamp": 1.0}, {"gopd_teacher_column": "domain"}]  # fmt: skip
WRONG = {
    "temperature": ({"temperature": 0.9}, "needs `temperature: 1.0`: .*; got `temperature: 0.9`"),
    "top_p": ({"top_p": 0.9}, "needs `top_p: 1.0`"),
    "top_k": ({"top_k": 1}, "needs `top_k: 0`"),
    "min_p": ({"min_p": 0.1}, "needs `min_p: None`"),
    "penalty": ({"repetition_penalty": 1.1}, "needs `repetition_penalty: 1.0`"),
    "generation": ({"generation_kwargs": {"num_beams": 2}}, r"`generation_kwargs: \{num_beams: 2\}` replaces plain draws"),
    "reference": ({"reference_model_name_or_path": "r"}, "has no effect with `reward_scale: 1.0`"),
    "cap, full": ({"gopd_full_vocab": True, "gopd_tis_cap": 5.0, "use_vllm": True}, "`gopd_tis_cap: 5.0` acts on sampled"),
    "clamp, full": ({"gopd_full_vocab": True, "gopd_logratio_clamp": 0.5}, "`gopd_logratio_clamp: 0.5` acts on sampled"),
    "cap": ({"gopd_tis_cap": 5.0}, "needs a sampler that reports log-probabilities"),
    "column, GKD": ({"gopd_teacher_column": "domain", "seq_kd": False}, "which GKD has turned into tokens"),
    "column, full": ({"gopd_teacher_column": "domain", "gopd_full_vocab": True}, "names several teachers"),
}  # fmt: skip


@pytest.mark.parametrize("keys", FINE)
def test_rules_of_gopd_find_nothing_wrong(keys):
    assert [*GOPD.method.rules(SimpleNamespace(**DEFAULTS | NEUTRAL | keys))] == []


@pytest.mark.parametrize("keys, message", WRONG.values(), ids=WRONG)
def test_rules_of_gopd_say_one_thing(keys, message):
    [found] = GOPD.method.rules(SimpleNamespace(**DEFAULTS | NEUTRAL | keys))
    assert re.search(message, found)
