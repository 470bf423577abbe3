import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_rb.objectives import adaptive_kl, adaptive_kl_weight, forward_kl, reverse_kl
from hf_rb.objectives.akl import _CANDIDATES, _head, _sorted_head, adaptive_kl_rule


P, Q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("paper", [0.375, 0.375, 0.5, 0.5, 0.625, 0.625, 1.0]),
        ("code", [0.375, 0.375, 0.375, 0.5, 0.5, 0.625, 1.0]),
    ],
)
def test_example_a_weights(rule, expected):
    weights = [adaptive_kl_weight(Q.log(), P.log(), mu, rule).item() for mu in (0.3, 0.4, 0.5, 0.7, 0.75, 0.9, 1.0)]
    assert weights == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rule", "gradient"),
    [
        ("paper", [-0.24213646, -0.13618999, 0.04235454, 0.33597191]),
        ("code", [-0.22767057, -0.14523749, 0.02794318, 0.34496489]),
    ],
)
def test_example_a_value_and_gradient(rule, gradient):
    student = Q.log().requires_grad_()
    loss = adaptive_kl(student, P.log(), 0.5, rule)
    assert loss.item() == pytest.approx(0.45643482, rel=1e-6)
    assert_close(torch.autograd.grad(loss, student)[0], torch.tensor(gradient), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_akl_on_example_c_of_the_notes(rule):
    p, q = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]), torch.tensor([0.45, 0.05, 0.25, 0.05, 0.2])
    assert adaptive_kl_weight(q.log(), p.log(), 0.5, rule).item() == pytest.approx(0.1, rel=1e-5)
    assert forward_kl(q.log(), p.log()).item() == pytest.approx(0.25331529, rel=1e-6)
    assert reverse_kl(q.log(), p.log()).item() == pytest.approx(0.25358097, rel=1e-6)
    assert adaptive_kl(q.log(), p.log(), 0.5, rule).item() == pytest.approx(0.25355440, rel=1e-6)


logits = st.builds(
    lambda vocabulary, seed: torch.randn(2, 5, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2,
    st.integers(2, 200),
    st.integers(0, 10_000),
)


@given(logits, st.floats(0.05, 1.0), st.sampled_from(["paper", "code"]), st.integers(0, 1000))
def test_akl_lies_between_both_divergences_in_any_order(pair, mu, rule, seed):
    student, teacher = pair
    weight = adaptive_kl_weight(student, teacher, mu, rule)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    loss = adaptive_kl(student, teacher, mu, rule)
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (loss <= torch.maximum(forward, reverse) + 1e-5).all() and (
        loss >= torch.minimum(forward, reverse) - 1e-5
    ).all()
    permutation = torch.randperm(student.shape[-1], generator=torch.Generator().manual_seed(seed))
    assert_close(
        adaptive_kl(student[..., permutation], teacher[..., permutation], mu, rule), loss, atol=1e-4, rtol=1e-4
    )


@given(logits, st.sampled_from(["paper", "code"]))
def test_a_head_of_one_gives_at_most_half_the_weight(pair, rule):
    student, teacher = pair
    mu = 0.9 * teacher.softmax(-1).amax(-1).min().item()  # the most probable token alone reaches it
    # Its gap is at most that of all others, for both distributions have the sum 1: in float32, up to half a rounding for each token.
    total = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    rounding = 2 * student.shape[-1] * torch.finfo(torch.float32).eps / total
    assert (adaptive_kl_weight(student, teacher, mu, "paper") <= 0.5 + rounding).all()


def test_a_head_of_one_where_the_distributions_are_nearly_equal():
    generator = torch.Generator().manual_seed(589)
    student, teacher = 2 * torch.randn(2, 5, 2, generator=generator)
    test_a_head_of_one_gives_at_most_half_the_weight.hypothesis.inner_test((student, teacher), "paper")


def test_mu_one_is_forward_kl():
    student, teacher = torch.randn(2, 6, 50)
    assert_close(adaptive_kl(student, teacher, mu=1.0), forward_kl(student, teacher))


def test_equal_distributions_have_no_loss_and_no_nan():
    student = torch.randn(4, 9, requires_grad=True)
    loss = adaptive_kl(student, student.detach())
    loss.sum().backward()
    assert_close(loss, torch.zeros(4))
    assert torch.isfinite(student.grad).all()


def test_the_weight_and_the_teacher_get_no_gradient():
    student, teacher = torch.randn(2, 3, 9, requires_grad=True)
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    assert not adaptive_kl_weight(student, teacher).requires_grad
    weight = adaptive_kl_weight(student, teacher)
    (grad,) = torch.autograd.grad(adaptive_kl(student, teacher).sum(), student)
    mixture = weight * forward_kl(student, teacher) + (1 - weight) * reverse_kl(student, teacher)
    assert_close(grad, torch.autograd.grad(mixture.sum(), student)[0])
    assert_close(grad.sum(-1), torch.zeros(3), atol=1e-6, rtol=0)
    assert teacher.grad is None


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("spread, vocabulary", [(4, 500), (0.1, 500), (2, 6000)])
def test_the_fast_head_is_the_sorted_head(rule, spread, vocabulary):
    torch.manual_seed(0)
    logits = (
        torch.randn(20, vocabulary) * spread
    )  # heads within the candidates, beyond them, beyond them and not everything
    p, gap = logits.softmax(-1), torch.rand(20, vocabulary)
    for mine, reference in zip(_head(p, gap, 0.5, rule), _sorted_head(p, gap, 0.5, rule), strict=True):
        assert_close(mine, reference)


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_ties_across_the_border_are_taken_by_index(rule):
    p = torch.full((1, 2 * _CANDIDATES), 1 / (2 * _CANDIDATES))
    p[0, 7] += 0.1
    gap = torch.arange(2.0 * _CANDIDATES).unsqueeze(0)
    for mine, reference in zip(
        _head(p / p.sum(), gap, 0.2, rule), _sorted_head(p / p.sum(), gap, 0.2, rule), strict=True
    ):
        assert_close(mine, reference)


def test_rule_gives_loss_and_gradient_of_the_dense_function():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 300)
    student.requires_grad_()
    loss = adaptive_kl(student, teacher)
    (expected,) = torch.autograd.grad(loss.sum(), student)
    log_q = student.detach().log_softmax(-1)
    value, c, stats = adaptive_kl_rule(log_q, teacher.log_softmax(-1))
    assert_close(value, loss.detach())
    assert_close(c - log_q.exp() * c.sum(-1, keepdim=True), expected, atol=1e-6, rtol=1e-4)
    assert_close(stats["akl_weight"], adaptive_kl_weight(student, teacher))
    assert (stats["akl_head_size"] >= 1).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"mu": 0.0}, "mu=0.0"), ({"mu": 1.1}, "mu=1.1"), ({"head_rule": "top"}, "'paper' or 'code'")],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        adaptive_kl(torch.randn(2, 3), torch.randn(2, 3), **kwargs)


# A cached teacher: the last event is the rest of the vocabulary

FLAT_P, FLAT_Q = (torch.tensor([*top, *[0.01] * 50]) for top in ((0.3, 0.2), (0.4, 0.1)))
SIX_P, SIX_Q = torch.tensor([0.60, 0.25, 0.08, 0.04, 0.02, 0.01]), torch.tensor([0.30, 0.30, 0.05, 0.05, 0.10, 0.20])


def events(probs, k):
    """The first k probabilities, and the sum of the others."""
    return torch.cat([probs[:k], probs[k:].sum(-1, keepdim=True)]).log()


def test_the_rest_is_last_however_probable_it_is():
    """As one token it would be the whole head here, and turn forward into reverse KL."""
    expected = adaptive_kl_weight(FLAT_Q.log(), FLAT_P.log()), adaptive_kl(FLAT_Q.log(), FLAT_P.log())
    pair = events(FLAT_Q, 2), events(FLAT_P, 2)
    assert [adaptive_kl_weight(*pair, has_rest=True).item(), expected[0].item()] == pytest.approx([1.0, 1.0])
    assert [adaptive_kl(*pair, has_rest=True).item(), expected[1].item()] == pytest.approx([0.052325] * 2, abs=1e-6)
    assert adaptive_kl_weight(*pair).item() == pytest.approx(0.0, abs=1e-6)
    assert adaptive_kl(*pair).item() == pytest.approx(0.045758, abs=1e-6)


@pytest.mark.parametrize(("k", "loss", "weight"), [(2, 0.231134, 0.5), (4, 0.436421, None), (6, 0.477380, 0.454545)])
def test_akl_of_a_cache(k, loss, weight):
    """What a cache of k tokens cannot know makes the loss smaller and the weight larger."""
    pair = [events(part, k) if k < 6 else part.log() for part in (SIX_Q, SIX_P)]
    assert adaptive_kl(*pair, has_rest=k < 6).item() == pytest.approx(loss, abs=1e-6)
    if weight is not None:
        assert adaptive_kl_weight(*pair, has_rest=k < 6).item() == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize(("mu", "paper", "code"), [(0.3, 1, 1), (0.5, 2, 2), (0.6, 3, 2), (1.0, 3, 3)])
def test_the_rest_joins_a_head_that_known_tokens_do_not_fill(mu, paper, code):
    pair = events(FLAT_Q, 2), events(FLAT_P, 2)
    for rule, size in (("paper", paper), ("code", code)):
        assert adaptive_kl_rule(*pair, mu, rule, has_rest=True)[2]["akl_head_size"].item() == size


@given(logits, st.floats(0.05, 0.95), st.sampled_from(["paper", "code"]), st.floats(0.1, 1.0))
def test_weight_of_a_cache_is_off_by_what_cancels_in_the_rest(pair, mu, rule, share):
    """Where the known tokens fill the head it is the true head, and g_tail is short by at most 2 min(r, s)."""
    student, teacher = (part.log_softmax(-1) for part in pair)
    order = teacher.argsort(dim=-1, descending=True, stable=True)
    student, teacher = student.gather(-1, order), teacher.gather(-1, order)
    k = max(1, int(share * (teacher.shape[-1] - 1)))
    known = [torch.cat([x[..., :k], x[..., k:].logsumexp(-1, keepdim=True)], -1) for x in (student, teacher)]
    (_, _, full), (_, _, cached) = (
        adaptive_kl_rule(student, teacher, mu, rule),
        adaptive_kl_rule(*known, mu, rule, has_rest=True),
    )
    r, s = known[1][..., -1].exp(), known[0][..., -1].exp()
    filled = 1 - r > mu + 1e-5
    assert torch.equal(cached["akl_head_size"][filled], full["akl_head_size"][filled])
    total = (student.exp() - teacher.exp()).abs().sum(-1)
    head = full["akl_weight"] * total
    least = head / total
    most = head / (total - 2 * torch.minimum(r, s)).clamp(min=1e-9)
    assert (cached["akl_weight"] >= least - 1e-4)[filled].all() and (cached["akl_weight"] <= most + 1e-4)[filled].all()


def test_weight_of_equal_distributions_is_a_half():
    """Any weight gives the same loss of 0; what is logged is the middle."""
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adaptive_kl_weight(logits, logits), torch.full((4,), 0.5))
