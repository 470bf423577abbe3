import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_rb.objectives import hpd_loss, hpd_weights
from hf_rb.objectives.hpd import inverse_cdf_sample


P, Q = torch.tensor([0.6, 0.2, 0.15, 0.05]), torch.tensor([0.25, 0.45, 0.20, 0.10])

# y, a, w_y, w_a, loss, gradient
CASES = {
    "A": (0, 1, 1.418867, -0.364919, 1.675577, [-1.155380, 0.839195, 0.210790, 0.105395]),
    "B": (0, 0, 0.818867, 0.0, 1.135191, [-0.614150, 0.368490, 0.163773, 0.081887]),
    "C": (0, 2, 1.418867, -0.057536, 1.874366, [-1.078534, 0.612599, 0.329803, 0.136133]),
    "E": (1, 1, -0.364919, 0.0, -0.291390, [-0.091230, 0.200705, -0.072984, -0.036492]),
}


def weights(label, drawn, p=P, q=Q, **kwargs):
    return hpd_weights(
        q.log()[label], p.log()[label], q.log()[drawn], p.log()[drawn], torch.tensor(label == drawn), **kwargs
    )


@pytest.mark.parametrize("case", CASES)
def test_worked_table(case):
    label, sample, w_label, w_sample, loss, gradient = CASES[case]
    assert_close(torch.stack(weights(label, sample)), torch.tensor([w_label, w_sample]), atol=1e-5, rtol=0)
    student = Q.log().requires_grad_()
    result = hpd_loss(student, P.log(), torch.tensor(label), torch.tensor(sample))
    assert result.item() == pytest.approx(loss, abs=1e-5)
    assert_close(torch.autograd.grad(result, student)[0], torch.tensor(gradient), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("label", "w_label", "w_sample", "loss", "gradient"),
    [
        (0, 1.268867, -0.182652, 1.593417, [-0.997313, 0.653010, 0.228750, 0.115553]),
        (2, -0.057536, -0.171145, -0.239687, [-0.057170, 0.061307, 0.011800, -0.015937]),
    ],
)
def test_expectation_over_the_sample(label, w_label, w_sample, loss, gradient):
    student = Q.log().repeat(4, 1).requires_grad_()
    labels, samples = torch.full((4,), label), torch.arange(4)
    losses = hpd_loss(student, P.log().repeat(4, 1), labels, samples)
    assert (Q * losses).sum().item() == pytest.approx(loss, abs=1e-5)
    (grad,) = torch.autograd.grad((Q * losses).sum(), student)
    assert_close(grad.sum(0), torch.tensor(gradient), atol=1e-5, rtol=0)
    pairs = torch.stack([torch.stack(weights(label, sample)) for sample in range(4)])
    assert_close((Q[:, None] * pairs).sum(0), torch.tensor([w_label, w_sample]), atol=1e-5, rtol=0)


def test_hpd_without_sample_or_reinforce_is_the_worked_example():
    without_sample = weights(0, 1, sample=False)
    assert_close(torch.stack(without_sample), torch.tensor([0.6 + 0.218867, 0.0]), atol=1e-5, rtol=0)
    without_reinforce = weights(0, 1, reinforce=False)
    assert_close(torch.stack(without_reinforce), torch.tensor([0.818867, -0.364919]), atol=1e-5, rtol=0)


def test_identical_models_are_weighted_by_p():
    w_label, w_sample = weights(1, 2, p=Q, q=Q)
    assert_close(w_label, Q[1])
    assert w_sample == 0


def test_underflow_of_the_label_keeps_its_weight():
    w_label, _ = hpd_weights(*(torch.tensor(x) for x in (-120.0, math.log(0.6), math.log(0.5), math.log(0.5), False)))
    assert w_label.item() == pytest.approx(0.6, rel=1e-5)


def test_a_token_that_the_teacher_excludes_stays_finite():
    student = torch.zeros(1, 3, requires_grad=True)
    loss = hpd_loss(student, torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([2]), torch.tensor([2]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(student.grad).all()


def test_ignored_positions():
    student = torch.randn(3, 5, requires_grad=True)
    teacher = torch.randn(3, 5)
    teacher[1] = torch.nan
    loss = hpd_loss(student, teacher, torch.tensor([1, -100, 2]), torch.tensor([0, 3, 2]))
    loss.sum().backward()
    assert loss[1] == 0
    assert student.grad[1].abs().sum() == 0 and torch.isfinite(student.grad).all()


log_probs = st.floats(-20, -1e-3)


@given(log_probs, log_probs, log_probs, log_probs, st.booleans())
def test_hpd_weights_stay_within_their_bounds(q_label, p_label, q_sample, p_sample, same):
    if same:
        q_sample, p_sample = q_label, p_label
    w_label, w_sample = hpd_weights(
        *(torch.tensor(x) for x in (q_label, p_label, q_sample, p_sample)), torch.tensor(same)
    )
    assert w_label <= (2 + 1 / math.e) * math.exp(p_label) + 1e-6
    assert w_sample <= 0 and not (same and w_sample != 0)


def test_weights_carry_no_gradient():
    student = Q.log().requires_grad_()
    assert not any(w.requires_grad for w in hpd_weights(*student[:4], torch.tensor(False)))


def test_samples_follow_the_distribution():
    uniforms = (torch.arange(100_000) + 0.5) / 100_000
    samples = inverse_cdf_sample(Q.expand(len(uniforms), 4), uniforms)
    assert_close(samples.bincount(minlength=4) / len(uniforms), Q, atol=1e-4, rtol=0)


def test_improbable_and_impossible_tokens():
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).expand(3, 4)
    assert inverse_cdf_sample(probs, torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [1, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "sample", "expected"),
    [
        (0, True, [0.601, 0.193, 0.151, 0.055]),
        (0, False, [0.6, 0.1333, 0.1333, 0.1333]),
        (3, True, [0.6, 0.2, 0.15, 0.05]),
        (3, False, [0.3167, 0.3167, 0.3167, 0.05]),
    ],
)
def test_tabular_convergence(label, sample, expected):
    torch.manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    labels = torch.full((512,), label)
    for step in range(4000):
        rows = logits.expand(512, 4)
        samples = inverse_cdf_sample(rows.detach().softmax(-1), torch.rand(512))
        loss = hpd_loss(rows, P.log().expand(512, 4), labels, samples, sample=sample).mean()
        (grad,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 0.5 * (0.01 / 0.5) ** (step / 4000) * grad
    assert_close(logits.detach().softmax(-1), torch.tensor(expected), atol=0.02, rtol=0)
