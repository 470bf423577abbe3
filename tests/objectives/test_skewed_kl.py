"""Skewed KL against its equations, its limits, and autograd in the tile loop."""

import math

import pytest
import torch
from torch.testing import assert_close

from hf_rb.objectives import forward_kl, reverse_kl
from hf_rb.objectives.skewed_kl import SkewedKL, skewed_kl


P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
Q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2]])


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_skewed_kl_is_its_equation(alpha):
    mixture = alpha * P + (1 - alpha) * Q
    assert_close(skewed_kl(Q.log(), P.log(), alpha), (P * (P / mixture).log()).sum(-1))
    mixture = (1 - alpha) * P + alpha * Q
    assert_close(skewed_kl(Q.log(), P.log(), alpha, "reverse"), (Q * (Q / mixture).log()).sum(-1))


def test_skewed_kl_at_alpha_zero_is_kl():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    assert torch.equal(skewed_kl(student, teacher, 0.0, temperature=2.0), forward_kl(student, teacher, 2.0))
    assert torch.equal(skewed_kl(student, teacher, 0.0, "reverse"), reverse_kl(student, teacher))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_skewed_kl_of_disjoint_models_is_bounded(direction):
    student = torch.tensor([[0.0, -torch.inf]]).requires_grad_()
    loss = skewed_kl(student, torch.tensor([[-torch.inf, 0.0]]), 0.25, direction)
    assert_close(loss, torch.tensor([-math.log(0.25)]))


@pytest.mark.parametrize(
    "options, message", [((1.0,), "alpha=1.0 must be in"), ((0.1, "up"), "direction='up' is unknown")]
)
def test_skewed_kl_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        skewed_kl(Q.log(), P.log(), *options)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_skewed_kl_derivative_is_that_of_the_formula(direction):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 13, requires_grad=True), torch.randn(6, 13)
    (expected,) = torch.autograd.grad(skewed_kl(student, teacher, 0.1, direction).sum(), student)
    objective = SkewedKL(skewed_kl_alpha=0.1, skewed_kl_direction=direction)
    log_q = student.detach().log_softmax(-1)
    with torch.no_grad():
        term = objective(log_q, teacher.log_softmax(-1), log_q, {})
    found = term.dense - log_q.exp() * term.dense.sum(-1, keepdim=True)
    assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert {"forward_kl", "reverse_kl", "entropy"} == {*term.stats}
