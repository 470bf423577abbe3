from functools import partial

import pytest
import torch
from torch.testing import assert_close

from hf_rb.objectives.akl import AKL, adaptive_kl
from hf_rb.objectives.divergences import forward_kl, jsd, reverse_kl
from hf_rb.objectives.gopd import GOPD
from hf_rb.objectives.hpd import HPD, hpd_loss, inverse_cdf_sample
from hf_rb.objectives.loca import loca_calibrate
from hf_rb.objectives.standard import JSD, ForwardKL, ReverseKL
from hf_rb.ops import lm_head
from hf_rb.ops.lm_head import CachedLogits, Head, TeacherLogits, lm_head_loss
from hf_rb.ops.lm_head_queries import lm_head_log_probs


N, V, H, H_TEACHER = 23, 301, 16, 24


@pytest.fixture
def case():
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(N, H, requires_grad=True),
        "weight": torch.randn(V, H, requires_grad=True),
        "bias": torch.randn(V, requires_grad=True),
        "teacher_hidden": torch.randn(N, H_TEACHER, requires_grad=True),
        "teacher_weight": (torch.randn(V, H_TEACHER) * 0.4).requires_grad_(),
        "labels": torch.randint(0, V, (N,)),
        "uniforms": torch.rand(N),
        "weights": torch.rand(N),
    }


def logits_of(case):
    student = case["hidden"] @ case["weight"].T + case["bias"]
    return student, (case["teacher_hidden"] @ case["teacher_weight"].T).detach()


def gradients(case, loss):
    return torch.autograd.grad(loss, [case["hidden"], case["weight"], case["bias"]])


def tiled(case, rule, **kwargs):
    teacher = kwargs.pop("teacher", [TeacherLogits(case["teacher_hidden"], Head(case["teacher_weight"]))])
    tokens = {"labels": case["labels"], "uniforms": case["uniforms"], **kwargs.pop("tokens", {})}
    return lm_head_loss(
        case["hidden"], Head(case["weight"], case["bias"]), rule, tokens, teacher, case["weights"], **kwargs
    )


def dense(case, objective, temperature=1.0, **options):
    student, teacher = logits_of(case)
    kinds = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": lambda *a: jsd(*a[:2], 0.3, a[2]),
        "akl": lambda *a: adaptive_kl(*a[:2], 0.5, "paper", a[2]),
        "akl_code": lambda *a: adaptive_kl(*a[:2], 0.7, "code", a[2]),
    }
    return kinds[objective](student, teacher, temperature)


RULES = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": JSD(beta=0.3),
    "akl": AKL(),
    "akl_code": AKL(akl_mu=0.7, akl_head_rule="code"),
}


@pytest.mark.parametrize("tile_rows", [1, 7, 64])
@pytest.mark.parametrize("objective", RULES)
def test_equals_dense(case, objective, tile_rows):
    expected = dense(case, objective)
    result = tiled(case, RULES[objective], tile_rows=tile_rows)
    assert_close(result.stats["loss"], expected)
    assert_close(result.loss, (expected * case["weights"]).sum())
    for mine, reference in zip(
        gradients(case, result.loss), gradients(case, (expected * case["weights"]).sum()), strict=True
    ):
        assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_temperature_scales_both(case):
    expected = (dense(case, "forward_kl", temperature=2.0) * case["weights"]).sum()
    result = tiled(case, RULES["forward_kl"], temperature=2.0)
    for mine, reference in zip(gradients(case, result.loss), gradients(case, expected), strict=True):
        assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_scale_and_softcap(case):
    student, teacher = logits_of(case)
    student = 3 * torch.tanh(student * 0.5 / 3)
    expected = (forward_kl(student, teacher) * case["weights"]).sum()
    head = Head(case["weight"], case["bias"], scale=0.5, softcap=3.0)
    teacher = [TeacherLogits(case["teacher_hidden"], Head(case["teacher_weight"]))]
    loss = lm_head_loss(case["hidden"], head, RULES["forward_kl"], {}, teacher, case["weights"]).loss
    assert_close(loss, expected)
    for mine, reference in zip(gradients(case, loss), gradients(case, expected), strict=True):
        assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_cross_entropy_and_loca(case):
    student, teacher = logits_of(case)
    log_q = student.log_softmax(-1)
    nll = -log_q.gather(-1, case["labels"].unsqueeze(-1)).squeeze(-1)
    calibrated = loca_calibrate(teacher.softmax(-1), case["labels"], 0.9)
    expected = ((0.3 * nll + 0.7 * forward_kl(student, calibrated.log())) * case["weights"]).sum()
    result = tiled(case, ForwardKL(kd_alpha=0.7, loca_alpha=0.9))
    assert_close(result.loss, expected)
    for mine, reference in zip(gradients(case, result.loss), gradients(case, expected), strict=True):
        assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile_rows", [1, 5, 64])
def test_hpd_equals_dense_with_the_same_draw(case, tile_rows):
    student, teacher = logits_of(case)
    samples = inverse_cdf_sample(student.detach().softmax(-1), case["uniforms"])
    expected = hpd_loss(student, teacher, case["labels"], samples)
    result = tiled(case, HPD(), tile_rows=tile_rows)
    assert_close(result.stats["loss"], expected)
    for mine, reference in zip(
        gradients(case, result.loss), gradients(case, (expected * case["weights"]).sum()), strict=True
    ):
        assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_gopd_gradient_is_the_advantage_times_the_score(case):
    student, teacher = logits_of(case)
    log_q, log_t = (x.log_softmax(-1).gather(-1, case["labels"].unsqueeze(-1)).squeeze(-1) for x in (student, teacher))
    reference_logp = log_t - 0.1
    advantage = (1.25 * (log_t - reference_logp) - (log_q - reference_logp)).detach()
    expected = -(advantage * log_q * case["weights"]).sum()
    tokens = {"teacher_logp": log_t, "reference_logp": reference_logp}
    result = tiled(case, GOPD(reward_scale=1.25), teacher=None, tokens=tokens)
    assert_close(result.stats["advantage"], advantage)
    for mine, reference in zip(gradients(case, result.loss), gradients(case, expected), strict=True):
        assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_a_mixture_of_teachers_is_a_mixture_of_logits(case):
    student, teacher = logits_of(case)
    expected = (reverse_kl(student, 1.25 * teacher - 0.25 * student) * case["weights"]).sum()
    parts = [
        TeacherLogits(case["teacher_hidden"], Head(case["teacher_weight"]), 1.25),
        TeacherLogits(case["hidden"], Head(case["weight"], case["bias"]), -0.25),
    ]
    result = tiled(case, RULES["reverse_kl"], teacher=parts)
    assert_close(result.loss, expected)


@pytest.mark.parametrize("objective", ["forward_kl", "akl"])
def test_cache_of_the_whole_vocabulary_equals_dense(case, objective):
    _, teacher = logits_of(case)
    log_p, ids = teacher.log_softmax(-1).sort(dim=-1, descending=True)
    expected = (dense(case, objective) * case["weights"]).sum()
    result = tiled(case, RULES[objective], teacher=CachedLogits(ids, log_p, torch.zeros(N)))
    assert_close(result.loss, expected)
    for mine, reference in zip(gradients(case, result.loss), gradients(case, expected), strict=True):
        assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 40.0], ids=["", "a teacher that is sure"])
@pytest.mark.parametrize("objective", ["forward_kl", "akl"])
def test_cache_is_a_distribution_over_its_ids_and_the_rest(case, objective, scale):
    case["teacher_weight"] = case["teacher_weight"].detach() * scale
    student, teacher = logits_of(case)
    log_p, ids = teacher.log_softmax(-1).topk(9, dim=-1)

    def events(log_probs):
        known = log_probs.gather(-1, ids)
        rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([known, rest], -1)

    function = {"forward_kl": forward_kl, "akl": partial(adaptive_kl, has_rest=True)}[objective]
    expected = function(events(student.log_softmax(-1)), events(teacher.log_softmax(-1)))
    rest = events(teacher.log_softmax(-1))[:, -1]
    assert (rest.exp().max() < 1e-7) == (scale > 1)
    result = tiled(case, RULES[objective], teacher=CachedLogits(ids, log_p, rest))
    assert_close(result.stats["loss"], expected)
    expected = (expected * case["weights"]).sum()
    for mine, reference in zip(gradients(case, result.loss), gradients(case, expected), strict=True):
        assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_the_rest_of_a_cache_is_the_largest_event_and_no_token():
    """p = (.3, .2, 50 x .01), q = (.4, .1, 50 x .01), of which two tokens are stored: AKL and LoCa are those of all logits."""
    p, q = (torch.tensor([[*top, *[0.01] * 50]]).log() for top in ((0.3, 0.2), (0.4, 0.1)))
    cached = CachedLogits(torch.tensor([[0, 1]]), p[:, :2], torch.tensor([0.5]).log())
    everything = [TeacherLogits(p, Head(torch.eye(52)))]

    def stats(rule, label=0, teacher=cached):
        tokens = {"labels": torch.tensor([label]), "label_event": torch.tensor([label])}
        return lm_head_loss(q, Head(torch.eye(52)), rule, tokens, teacher).stats

    for teacher in (cached, everything):
        found = stats(AKL(), teacher=teacher)
        assert (found["akl_weight"].item(), found["loss"].item()) == pytest.approx((1.0, 0.052325), abs=1e-6)
        for label, scale in ((0, 1.0), (1, 0.818182)):
            loca = stats(ForwardKL(loca_alpha=0.9), label, teacher)
            assert loca["loca_scale"].item() == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize("k, loss", [(2, 0.231134), (4, 0.436421)])
def test_worked_numbers_of_a_cache(k, loss):
    p, q = torch.tensor([[0.60, 0.25, 0.08, 0.04, 0.02, 0.01]]), torch.tensor([[0.30, 0.30, 0.05, 0.05, 0.10, 0.20]])
    cached = CachedLogits(torch.arange(k)[None], p[:, :k].log(), p[:, k:].sum(-1).log())
    found = lm_head_loss(q.log(), Head(torch.eye(6)), AKL(), {}, cached).stats
    assert found["loss"].item() == pytest.approx(loss, abs=1e-6)


def test_padded_vocabularies_meet_on_the_shared_ids(case):
    case["labels"] = case["labels"].clamp(max=289)
    student, teacher = logits_of(case)
    expected = (forward_kl(student[:, :290], teacher[:, :290]) * case["weights"]).sum()
    result = tiled(case, RULES["forward_kl"], vocabulary=290)
    _, weight, _ = gradients(case, result.loss)
    assert_close(result.loss, expected)
    assert weight[290:].abs().max() == 0


def test_no_tokens_is_a_finite_zero(case):
    case = {name: tensor[:0] if len(tensor) == N else tensor for name, tensor in case.items()}
    result = tiled(case, RULES["akl"])
    assert result.loss == 0
    assert all(torch.isfinite(grad).all() for grad in gradients(case, result.loss))


def test_no_gradient_reaches_the_teacher(case):
    result = tiled(case, RULES["jsd"])
    result.loss.backward()
    assert case["teacher_hidden"].grad is None and case["teacher_weight"].grad is None


def test_frozen_head_gets_no_gradient(case):
    result = lm_head_loss(case["hidden"], Head(case["weight"].detach()), RULES["forward_kl"], {}, [
        TeacherLogits(case["teacher_hidden"], Head(case["teacher_weight"]))
    ])  # fmt: skip
    result.loss.backward()
    assert case["hidden"].grad is not None


def test_evaluation_computes_no_gradient(case, monkeypatch):
    expected = tiled(case, RULES["akl"]).loss.detach()
    monkeypatch.delattr(lm_head, "_write_gradient")
    with torch.no_grad():
        assert_close(tiled(case, RULES["akl"]).loss, expected)


def test_half_precision_heads_are_projected_in_float32(case):
    half = {
        name: case[name].detach().bfloat16().requires_grad_()
        for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight")
    }
    wide = {name: tensor.detach().float().requires_grad_() for name, tensor in half.items()}
    narrow, exact = ({**case, **part} for part in (half, wide))
    assert_close(tiled(narrow, RULES["akl"]).stats["loss"], dense(exact, "akl"))
    for grad in gradients(narrow, tiled(narrow, RULES["akl"]).loss):
        assert grad.dtype == torch.bfloat16


def test_log_probs(case):
    student, _ = logits_of(case)
    expected = student.log_softmax(-1).gather(-1, case["labels"].unsqueeze(-1)).squeeze(-1)
    assert_close(
        lm_head_log_probs(case["hidden"], Head(case["weight"], case["bias"]), case["labels"]), expected.detach()
    )


@pytest.mark.parametrize("rule", [ForwardKL(), HPD()])
def test_a_rule_that_compares_refuses_a_missing_teacher(case, rule):
    with pytest.raises(TypeError, match="compares the student with a teacher, and none is given"):
        tiled(case, rule, teacher=None)
