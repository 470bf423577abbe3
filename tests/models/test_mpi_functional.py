import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_rb.models.mpi.functional import alignment, effective_router, expert_matrix, power_step


N, WIDTH, D = 5, 4, 6


def draw(seed=0, experts=N, width=WIDTH, hidden=D, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(experts, hidden, generator=generator, dtype=dtype)
    matrices = torch.randn(experts, width, hidden, generator=generator, dtype=dtype)
    return router.requires_grad_(grad), matrices.requires_grad_(grad)


def by_autograd(router, matrices, scale, iters=1):
    """The paper's formula, a step an einsum."""
    for _ in range(iters):
        router = torch.einsum("nkd,nke,ne->nd", matrices, matrices, router)
    return scale / len(router) ** 0.5 * nn.functional.normalize(router, dim=-1)


def test_a_worked_example():
    router, matrices = torch.ones(1, 3), torch.tensor([[[3.0, 0, 0], [0, 1, 0]]])
    effective = effective_router(router, matrices, 0.5)
    torch.testing.assert_close(effective, torch.tensor([[0.496942, 0.055216, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(alignment(router, matrices), torch.tensor([0.608581]), atol=1e-6, rtol=0)
    torch.testing.assert_close(alignment(effective, matrices), torch.tensor([0.994565]), atol=1e-6, rtol=0)
    for steps in range(1, 5):  # tangents of the angle are powers of (σ₂/σ₁)²
        row = effective_router(router.double(), matrices.double(), 0.5, steps)[0]
        assert row[1] / row[0] == pytest.approx(9.0**-steps, rel=1e-12)


def test_rows_near_the_singular_vector_at_the_spectrums_ratio():
    router, matrices = draw(experts=1, width=6, hidden=4)
    _, sigma, right = torch.linalg.svd(matrices[0])

    def tangent(row):
        cosine = (row @ right[0]).abs() / row.norm()
        return (1 - cosine**2).sqrt() / cosine

    angles = [tangent(effective_router(router, matrices, 1.0, steps)[0]) for steps in range(12, 18)]
    ratios = [(later / earlier).item() for earlier, later in zip(angles, angles[1:], strict=False)]
    assert ratios == pytest.approx([(sigma[1] / sigma[0]).item() ** 2] * 5, rel=0.01)


def test_a_worked_example_of_the_rate():
    draws = np.random.default_rng(0)
    matrices = torch.from_numpy(draws.standard_normal((1, 6, 4)))
    row = torch.from_numpy(draws.standard_normal((1, 4)))
    first = torch.linalg.svd(matrices[0]).Vh[0]
    tangents = []
    for _ in range(12):
        row = effective_router(row, matrices, 1.0)
        cosine = (row[0] @ first).abs()
        tangents.append((1 - cosine**2).sqrt() / cosine)
    ratios = [(later / earlier).item() for earlier, later in zip(tangents, tangents[1:], strict=False)]
    assert ratios[:3] == pytest.approx([0.4448, 0.4460, 0.4468], abs=5e-5)
    assert ratios[-1] == pytest.approx(0.4485, abs=5e-5)


@given(st.integers(0, 10**6), st.sampled_from([0, 1, 3]), st.floats(0.1, 10), st.floats(0.01, 100))
def test_length_scale_and_sign(seed, iters, scale, factor):
    router, matrices = draw(seed)
    effective = effective_router(router, matrices, scale, iters)
    torch.testing.assert_close(effective.norm(dim=1), torch.full((N,), scale / math.sqrt(N), dtype=torch.float64))
    torch.testing.assert_close(effective_router(factor * router, matrices, scale, iters), effective)
    torch.testing.assert_close(effective_router(-router, matrices, scale, iters), -effective)
    torch.testing.assert_close(effective_router(router, factor * matrices, scale, iters), effective)


@given(st.integers(0, 10**6))
def test_a_step_never_lowers_the_alignment(seed):
    router, matrices = draw(seed)
    before, after = alignment(router, matrices), alignment(effective_router(router, matrices, 2.0), matrices)
    assert (after >= before - 1e-6).all() and (after <= 1 + 1e-6).all() and (before >= 0).all()


def test_an_absolute_length_takes_the_place_of_the_scale():
    router, matrices = draw()
    torch.testing.assert_close(effective_router(router, matrices, 7.0, norm=1.0).norm(dim=1), torch.ones(N).double())
    same = effective_router(router, matrices, 2.0), effective_router(router, matrices, 7.0, norm=2 / N**0.5)
    torch.testing.assert_close(*same)


def test_no_step_only_brings_the_rows_to_their_length():
    router, matrices = draw()
    expected = 2.0 / N**0.5 * router / router.norm(dim=1, keepdim=True)
    torch.testing.assert_close(effective_router(router, matrices, 2.0, 0), expected)


@pytest.mark.parametrize("iters", [0, 1, 3])
def test_the_closed_form_gradient_is_autograds(iters):
    gradients = []
    for function in (effective_router, by_autograd):
        router, matrices = draw(grad=True)
        weights = torch.linspace(-1, 2, N * D, dtype=torch.float64).view(N, D)
        (function(router, matrices, 2.0, iters) * weights).sum().backward()
        gradients.append((router.grad, torch.zeros_like(matrices) if matrices.grad is None else matrices.grad))
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-10)
    router, matrices = draw(grad=True)
    assert torch.autograd.gradcheck(lambda *args: effective_router(*args, 2.0, iters), (router, matrices))


def test_gradients_are_tangent_and_of_rank_two():
    router, matrices = draw(grad=True)
    effective_router(router, matrices, 2.0)[:, 0].sum().backward()
    radial = (router.grad * router).sum(1).detach(), (matrices.grad * matrices).sum((1, 2)).detach()
    torch.testing.assert_close(radial, (torch.zeros(N).double(),) * 2, atol=1e-12, rtol=0)
    assert router.grad.norm() > 1e-3
    assert torch.linalg.matrix_rank(matrices.grad).tolist() == [2] * N


def test_where_gradients_go():
    full, experts_detached, power_detached = [], [], []
    for grad, found in (("full", full), ("detach_experts", experts_detached), ("detach_power", power_detached)):
        router, matrices = draw(grad=True)
        effective_router(router, matrices, 2.0, grad=grad)[:, 0].sum().backward()
        found += [router.grad, matrices.grad]
    torch.testing.assert_close(full[0], experts_detached[0])
    assert experts_detached[1] is None and power_detached[1] is None
    # Behind the step, the gradient that the row's direction gets; through the step, that times the Gram matrix.
    router, matrices = draw()
    torch.testing.assert_close(power_step(power_detached[0], matrices)[1], full[0])


def test_a_gradient_is_that_of_a_leaf_over_several_micro_batches():
    inputs = torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together, (router, matrices) = [], draw(grad=True)
    sum((x @ effective_router(router, matrices, 2.0).T).logsumexp(-1).sum() for x in inputs).backward()
    together += [router.grad, matrices.grad]
    router, matrices = draw(grad=True)
    leaf = effective_router(router, matrices, 2.0).detach().requires_grad_()
    for x in inputs:
        (x @ leaf.T).logsumexp(-1).sum().backward()
    effective_router(router, matrices, 2.0).backward(leaf.grad)
    torch.testing.assert_close(together, [router.grad, matrices.grad])


def test_shards_of_the_width_add_and_shards_of_experts_join():
    """What tensor and expert parallelism would exchange: N x D sums before the lengths, N x D rows after them."""
    router, matrices = draw()
    parts = sum(power_step(router, shard)[1] for shard in matrices.split(1, dim=1))
    torch.testing.assert_close(parts, power_step(router, matrices)[1])
    length = 2.0 / N**0.5
    shards = zip(router.split(2), matrices.split(2), strict=True)
    joined = torch.cat([effective_router(*shard, 2.0, norm=length) for shard in shards])
    torch.testing.assert_close(joined, effective_router(router, matrices, 2.0))


def test_bfloat16_experts_with_a_float32_router():
    router, matrices = draw(experts=8, width=512, hidden=1024, dtype=torch.float32, grad=True)
    exact = effective_router(router, matrices, 2.0)
    half = matrices.detach().bfloat16().requires_grad_()
    effective = effective_router(router, half, 2.0)
    assert effective.dtype == torch.float32
    torch.testing.assert_close(effective.norm(dim=1), torch.full((8,), 2 / 8**0.5))
    assert torch.cosine_similarity(effective, exact, dim=1).min() > 0.9999
    effective[:, 0].sum().backward()
    gradient, router.grad = router.grad, None
    exact[:, 0].sum().backward()
    assert half.grad.dtype == torch.bfloat16 and torch.isfinite(half.grad).all()
    assert torch.cosine_similarity(gradient.flatten(), router.grad.flatten(), dim=0) > 0.999
    assert torch.cosine_similarity(half.grad.float().flatten(), matrices.grad.flatten(), dim=0) > 0.999


def test_autocast_leaves_the_step_as_it_is():
    router, matrices = draw(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = effective_router(router, matrices, 2.0)
    assert torch.equal(cast, effective_router(router, matrices, 2.0))


def test_backward_pass_keeps_nothing_of_the_experts_size():
    router, matrices = draw(grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        effective_router(router, matrices, 2.0)
    large = [tensor for tensor in kept if tensor.numel() >= matrices.numel()]
    assert [tensor.data_ptr() for tensor in large] == [matrices.data_ptr()]


@pytest.mark.parametrize("iters", [1, 2])
def test_compiles_without_a_graph_break(iters):
    def total(router, matrices):
        return effective_router(router, matrices, 2.0, iters)[:, 0].sum()

    results = []
    for function in (total, torch.compile(total, backend="aot_eager", fullgraph=True)):
        router, matrices = draw(grad=True)
        value = function(router, matrices)
        value.backward()
        results.append((value.detach(), router.grad, matrices.grad))
    torch.testing.assert_close(*results)


def test_a_row_without_direction_gets_no_gradient():
    router, matrices = draw(grad=True)
    with torch.no_grad():
        router[0] = 0
    effective = effective_router(router, matrices, 2.0)
    effective.sum().backward()
    assert not effective[0].any() and not router.grad[0].any() and router.grad[1].any()
    assert torch.isfinite(matrices.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale=0.0 must be positive.*The default is 2.0"),
        ({"scale": -1.0}, "scale=-1.0 must be positive"),
        ({"scale": float("nan")}, "must be positive"),
        ({"scale": 1.0, "norm": 0.0}, "norm=0.0 must be positive"),
        ({"scale": 1.0, "iters": -1}, "iters=-1 must be 0"),
        ({"scale": 1.0, "grad": "none"}, "grad='none' must be one of 'full', 'detach_experts', 'detach_power'"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        effective_router(*draw(), **options)


def test_shapes_that_do_not_fit():
    router, matrices = draw()
    with pytest.raises(
        ValueError, match=r"router of shape \(5, 6\) needs matrices of shape \(5, d, 6\); got \(4, 4, 6\)"
    ):
        effective_router(router, matrices[:4], 2.0)


class Experts(nn.Module):
    """Weights of two experts of width 4 for a hidden size of 3, in every layout of transformers."""

    def __init__(self, has_gate=True, is_transposed=False, is_concatenated=True):
        super().__init__()
        self.has_gate, self.is_transposed, self.is_concatenated = has_gate, is_transposed, is_concatenated
        self.gate, self.up, self.down = torch.arange(72.0).view(3, 2, 4, 3)
        first = self.up
        if has_gate:
            both = torch.stack((self.gate, self.up), dim=1 if is_concatenated else 2)
            first = both.reshape(2, 8, 3)
        weights = {"gate_up_proj" if has_gate else "up_proj": first, "down_proj": self.down.mT}
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter((weight.mT if is_transposed else weight).contiguous()))


@pytest.mark.parametrize("is_concatenated", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_the_matrix_of_an_expert_in_every_layout(is_transposed, is_concatenated):
    experts = Experts(is_transposed=is_transposed, is_concatenated=is_concatenated)
    for matrix in ("gate", "up", "down"):
        view = expert_matrix(experts, matrix)
        assert torch.equal(view, getattr(experts, matrix))
        view.sum().backward()  # a view: the gradient reaches the weight
    assert all((weight.grad == 1).all() for weight in experts.parameters())


@pytest.mark.parametrize("is_transposed", [True, False])
def test_experts_without_a_gate_have_up_in_its_place(is_transposed):
    experts = Experts(has_gate=False, is_transposed=is_transposed)
    assert torch.equal(expert_matrix(experts), experts.up)
    assert torch.equal(expert_matrix(experts, "up"), experts.up)


def test_experts_that_have_no_matrix_to_see():
    experts = Experts()
    with pytest.raises(ValueError, match="matrix='gte' must be one of 'gate', 'up', 'down'"):
        expert_matrix(experts, "gte")
    with pytest.raises(TypeError, match="ModuleList is no fused experts module of transformers"):
        expert_matrix(nn.ModuleList())
    experts.gate_up_proj = nn.Parameter(torch.zeros(0))
    with pytest.raises(
        ValueError, match="DeepSpeed ZeRO-3, name the MoE block's class in `transformer_moe_cls_names`"
    ):
        expert_matrix(experts)
    experts.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"quantized weights \(torch.uint8\); fold the routers first"):
        expert_matrix(experts)
    experts = Experts()
    experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="split over processes.*tensor and expert parallelism"):
        expert_matrix(experts)
    wrapper = nn.Module()
    wrapper.base_layer = Experts()
    with pytest.raises(TypeError, match="adapts the experts' weights; merge the adapter first"):
        expert_matrix(wrapper)
