import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from trl.experimental.gkd import GKDTrainer

from hf_rb.objectives import forward_kl, jsd, reverse_kl
from hf_rb.objectives.divergences import forward_kl_rule, jsd_rule, reverse_kl_rule


# Probabilities of llm_neo's worked example.
P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
Q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.4, 0.4, 0.2]])
LABELS = torch.tensor([0, 1, 2])


def test_worked_numbers():
    assert_close(forward_kl(Q.log(), P.log()), torch.tensor([0.08512283, 0.09151622, 0.22314355]))
    nll = -Q.log().gather(-1, LABELS[:, None]).squeeze(-1)
    assert_close(nll, torch.tensor([0.69314718, 0.51082562, 1.60943791]))
    for alpha, expected in ((0.0, 0.93780357), (0.5, 0.53553222), (0.9, 0.21371514), (1.0, 0.13326087)):
        assert_close(((1 - alpha) * nll + alpha * forward_kl(Q.log(), P.log())).mean(), torch.tensor(expected))


def test_the_mix_is_cross_entropy_against_a_mixed_target():
    target = 0.9 * P + 0.1 * torch.eye(3)
    entropy = torch.special.entr(P).sum(-1)
    mixed = -(target * Q.log()).sum(-1) - 0.9 * entropy
    assert_close(mixed.mean(), torch.tensor(0.21371514))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd_is_trls(beta):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 11), torch.randn(2, 4, 11)
    expected = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1)
    assert_close(jsd(student, teacher, beta), expected)


@pytest.mark.parametrize(
    ("dense", "rule"),
    [
        (forward_kl, forward_kl_rule),
        (reverse_kl, reverse_kl_rule),
        (lambda s, t: jsd(s, t, 0.3), lambda q, p: jsd_rule(q, p, 0.3)),
        (lambda s, t: jsd(s, t, 0.0), lambda q, p: jsd_rule(q, p, 0.0)),
        (lambda s, t: jsd(s, t, 1.0), lambda q, p: jsd_rule(q, p, 1.0)),
    ],
    ids=["forward_kl", "reverse_kl", "jsd", "jsd0", "jsd1"],
)
def test_rules_give_loss_and_gradient_of_the_dense_functions(dense, rule):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 13, dtype=torch.double, requires_grad=True), torch.randn(6, 13)
    loss = dense(student, teacher)
    (expected,) = torch.autograd.grad(loss.sum(), student)
    log_q, log_p = student.detach().float().log_softmax(-1), teacher.log_softmax(-1)
    value, c = rule(log_q, log_p)
    assert_close(value, loss.detach().float())
    assert_close(c - log_q.exp() * c.sum(-1, keepdim=True), expected.float(), atol=1e-6, rtol=1e-4)


def test_gradients_in_closed_form():
    student = Q.log().clone().requires_grad_()
    (grad,) = torch.autograd.grad(forward_kl(student, P.log()).sum(), student)
    assert_close(grad, Q - P)
    (grad,) = torch.autograd.grad(reverse_kl(student, P.log()).sum(), student)
    divergence = reverse_kl(Q.log(), P.log()).unsqueeze(-1)
    assert_close(grad, Q * ((Q / P).log() - divergence))


def test_temperature_divides_both_logits():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    assert_close(forward_kl(student, teacher, temperature=2.0), forward_kl(student / 2, teacher / 2))


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    for function in (forward_kl, reverse_kl, jsd):
        function(student, teacher).sum().backward()
    assert teacher.grad is None


def test_a_token_that_the_teacher_excludes():
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    loss = forward_kl(student, teacher)
    loss.sum().backward()
    assert_close(loss, torch.tensor([3 / 2]).log())
    assert torch.isfinite(student.grad).all()
    assert reverse_kl(student, teacher).isinf().all()


@given(st.integers(2, 40), st.integers(0, 10_000), st.floats(0, 1))
def test_divergences_are_not_negative_and_zero_between_equals(vocabulary, seed, beta):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 4, vocabulary, generator=generator)
    assert (jsd(student, teacher, beta) > -1e-6).all()
    assert_close(jsd(student, student, beta), torch.zeros(4), atol=1e-6, rtol=0)
    permutation = torch.randperm(vocabulary, generator=generator)
    assert_close(jsd(student[:, permutation], teacher[:, permutation], beta), jsd(student, teacher, beta))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: jsd(x, x, beta=1.5), "beta=1.5"),
        (lambda x: forward_kl(x, x, temperature=0.0), "temperature=0.0"),
        (lambda x: forward_kl(x, x[..., :-1]), "differ in shape"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 5))
