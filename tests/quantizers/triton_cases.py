"""The tests of the Triton kernels, for whatever runs them: a GPU, or Triton's interpreter (see `test_triton.py`)."""

import math

import pytest
import torch

from hf_rb.quantizers import kernels
from hf_rb.quantizers.kernels import triton as gpu
from hf_rb.quantizers.kernels.layout import Layout, Part, pack
from hf_rb.quantizers.kernels.triton import digits, gemm
from hf_rb.quantizers.ptqtp import options as solver_options
from hf_rb.quantizers.ptqtp import reference, solver
from hf_rb.quantizers.ptqtp import solver_triton as triton_solver
from hf_rb.quantizers.ptqtp.format import TritPlanes, packed_width


DEVICE = "cpu" if digits.INTERPRETED.value else "cuda"
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}

NIBBLE = Part(4, (tuple(code // 3 - 1 for code in range(9)), tuple(code % 3 - 1 for code in range(9))))
CRUMB = Part(2, ((-1, 0, 1),))
SIGN = Part(1, ((-1, 1),))
SIGNS = Part(2, ((-1, 1, -1, 1), (-1, -1, 1, 1)))
GRID = Part(2, ((0, 1, 2, 3), (1, 1, 1, 1)))
FINE_GRID = Part(4, (tuple(range(16)), (1,) * 16))
COMBINATIONS = {
    "two trit-planes": (NIBBLE,),
    "one": (CRUMB,),
    "three": (NIBBLE, CRUMB),
    "one sign-plane": (SIGN,),
    "two sign-planes": (SIGNS,),
    "three sign-planes": (SIGNS, SIGN),
    "2-bit grid": (GRID,),
    "4-bit grid": (FINE_GRID,),
    "all sizes": (SIGN, GRID, NIBBLE),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def packed_matrix(layout, out_features=160):
    """Random codes and scales: packed bytes, scales and the matrix in float64, by definition."""
    codes = [
        torch.randint(len(part.basis[0]), (out_features, layout.in_features), generator=generator(), dtype=torch.uint8)
        for part in layout.parts
    ]
    scale = (torch.rand(out_features, layout.groups, layout.num_scales, generator=generator(1)) + 0.1).half()
    spread = scale.double().repeat_interleave(layout.group_size, dim=1)[:, : layout.in_features]
    rows = [
        torch.tensor(row)[code.long()] for part, code in zip(layout.parts, codes, strict=True) for row in part.basis
    ]
    matrix = (torch.stack(rows, dim=-1) * spread).sum(-1)
    return pack(codes, layout).to(DEVICE), scale.to(DEVICE), matrix.to(DEVICE)


def activations(rows, in_features, dtype=torch.float32):
    return torch.randn(rows, in_features, generator=generator(2)).to(DEVICE, dtype)


def check(output, x, matrix):
    expected = x.double() @ matrix.T
    assert output.shape == expected.shape and output.dtype == x.dtype
    assert (output - expected).norm() <= TOLERANCE[x.dtype] * expected.norm()


# Codes.


@pytest.mark.parametrize("radix", range(2, 16))
def test_floor_by_rounding_is_exact(radix):
    codes = torch.arange(16, dtype=torch.uint8)
    layout = Layout(16, 16, (Part(4, (tuple(code // radix for code in range(16)),)),))
    assert digits.recipe(layout.parts[0]).radix == radix
    one = torch.ones(1, 1, 1, dtype=torch.float16, device=DEVICE)
    found = gpu.dequantize(pack([codes[None]], layout).to(DEVICE), one, layout, torch.float32)
    assert found.flatten().tolist() == (codes // radix).tolist()


def test_recipes():
    for part in (NIBBLE, CRUMB, SIGN, SIGNS, GRID, FINE_GRID):
        found = digits.recipe(part)
        for k, row in enumerate(part.basis):
            assert tuple(found.value(k, code) for code in range(len(row))) == row
    assert digits.recipe(Part(2, ((0, 1, 4, 2),))) is None


def test_what_is_not_supported():
    layout = Layout(64, 32, (NIBBLE,))
    assert all(gpu.supports(dtype, layout) for dtype in TOLERANCE)
    assert not gpu.supports(torch.float64, layout)
    assert not gpu.supports(torch.float32, Layout(64, 32, (Part(2, ((0, 1, 4, 2),)),)))
    assert not gpu.supports(torch.float32, Layout(4096, 4096, (NIBBLE,)))


# Multiplication. Tails of 6 and 22 weights fill no byte, no slice and no power of two.


@pytest.mark.parametrize("parts", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_dequantized_matrix_is_exact(parts):
    layout = Layout(70, 32, parts)
    weight, scale, matrix = packed_matrix(layout, 9)
    for dtype in TOLERANCE:
        assert torch.equal(gpu.dequantize(weight, scale, layout, dtype), matrix.to(dtype))


@pytest.mark.parametrize("parts", COMBINATIONS.values(), ids=COMBINATIONS.keys())
@pytest.mark.parametrize(("rows", "block_m"), [(1, 1), (3, 16)])
def test_part_combinations(parts, rows, block_m):
    layout = Layout(150, 64, parts)
    weight, scale, matrix = packed_matrix(layout, 40)
    x = activations(rows, 150)
    check(gemm.multiply(x, weight, scale, layout, block_m=block_m, block_n=32, programs=2), x, matrix)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 8, 17])
def test_rows_and_types(rows, dtype):
    layout = Layout(320, 128, (NIBBLE,))
    weight, scale, matrix = packed_matrix(layout)
    x = activations(rows, 320, dtype)
    check(gpu.matmul(x, weight, scale, layout), x, matrix)


@pytest.mark.parametrize("parts", [(NIBBLE,), (NIBBLE, CRUMB)])
@pytest.mark.parametrize(
    ("in_features", "group_size"), [(5, 128), (33, 16), (96, 24), (288, 96), (129, 128), (64, 64)]
)
def test_group_lengths(in_features, group_size, parts):
    layout = Layout(in_features, group_size, parts)
    weight, scale, matrix = packed_matrix(layout, 33)
    for rows, block_m in [(1, 1), (2, 16)]:
        x = activations(rows, in_features)
        check(gemm.multiply(x, weight, scale, layout, block_m=block_m, block_n=32), x, matrix)


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_groups_of_a_row_in_several_programs(programs):
    layout = Layout(16 * 5 + 3, 16, (NIBBLE,))  # seven programs: some have no group
    weight, scale, matrix = packed_matrix(layout, 20)
    for rows, block_m in [(1, 1), (17, 16)]:
        x = activations(rows, layout.in_features)
        check(gemm.multiply(x, weight, scale, layout, block_m=block_m, block_n=16, programs=programs), x, matrix)


def test_many_rows_and_long_groups():
    layout = Layout(64, 32, (NIBBLE,))
    weight, scale, matrix = packed_matrix(layout, 24)
    x = activations(gemm.MAX_ROWS + 1, 64)
    check(gpu.matmul(x, weight, scale, layout), x, matrix)
    layout = Layout(600, 300, (NIBBLE,))
    weight, scale, matrix = packed_matrix(layout, 24)
    for rows in (1, 2, 9):
        x = activations(rows, 600, torch.float16)
        check(gpu.matmul(x, weight, scale, layout), x, matrix)


def test_shapes_and_strides():
    layout = Layout(96, 32, (NIBBLE,))
    weight, scale, matrix = packed_matrix(layout, 30)
    x = activations(6, 96)
    found = gpu.matmul(x.view(2, 3, 96), weight, scale, layout)
    assert found.shape == (2, 3, 30)
    check(found.flatten(0, 1), x, matrix)
    check(gpu.matmul(x.T.contiguous().T, weight, scale, layout), x, matrix)
    check(gpu.matmul(x[::2], weight, scale, layout), x[::2], matrix)
    # a slice of the weights of several experts
    check(gpu.matmul(x, weight.view(3, 10, -1)[1], scale.view(3, 10, 3, 2)[1], layout), x, matrix[10:20])


def test_nothing_to_do():
    layout = Layout(96, 32, (NIBBLE,))
    weight, scale, _ = packed_matrix(layout, 8)
    assert gpu.matmul(activations(0, 96), weight, scale, layout).shape == (0, 8)
    assert gpu.matmul(activations(6, 96).view(2, 3, 96)[:, :0], weight, scale, layout).shape == (2, 0, 8)
    assert gpu.matmul(activations(2, 96), weight[:0], scale[:0], layout).shape == (2, 0)


def test_result_does_not_depend_on_other_rows():
    layout = Layout(128, 64, (NIBBLE,))
    weight, scale, _ = packed_matrix(layout, 32)
    x = activations(5, 128, torch.float16)
    poisoned = torch.cat([x, torch.full_like(x[:1], math.nan)])
    assert torch.equal(gpu.matmul(poisoned, weight, scale, layout)[:5], gpu.matmul(x, weight, scale, layout))


def test_levels_that_are_no_digits_are_refused():
    with pytest.raises(ValueError, match=r"kernels for GPUs cannot write the levels \(\(0, 1, 5, 2\),\) in digits"):
        digits.constants(Layout(96, 32, (Part(2, ((0, 1, 5, 2),)),)))


def test_they_are_what_the_dispatch_takes_on_a_gpu(monkeypatch):
    layout = Layout(96, 32, (NIBBLE,))
    weight, scale, matrix = packed_matrix(layout, 40)
    monkeypatch.setattr(gpu, "available", lambda device: True)
    monkeypatch.setattr(kernels.cpu, "kernel", lambda: None)
    monkeypatch.setattr(kernels, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(kernels.reference, "dequantize", None)  # would fail
    x = activations(3, 96).requires_grad_()
    found = kernels.matmul(x, weight, scale, layout)
    check(found.detach(), x.detach(), matrix)
    found.sum().backward()
    torch.testing.assert_close(x.grad, matrix.sum(0).float().expand(3, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(kernels.dequantize(weight, scale, layout), matrix.float())

    dense = gaussian(6, 70)
    expected = solver.quantize_matrix(dense, group_size=32)
    monkeypatch.setattr(solver, "_compiled", lambda weight: triton_solver)
    monkeypatch.setattr(solver, "fit_groups", None)
    for found, value in zip(solver.quantize_matrix(dense, group_size=32), expected, strict=True):
        assert (
            torch.equal(found, value) if isinstance(value, torch.Tensor) else found == pytest.approx(value, rel=1e-5)
        )


# The solver, against the torch code.


def rule(planes, *, multistart=False, tied=False, relative=False, **changes):
    found = solver_options.SolverOptions(
        planes=planes,
        direction=torch.tensor(solver_options.TIED, dtype=torch.float64, device=DEVICE) if tied else None,
        starts=solver_options.starts(planes, multistart),
        max_iter=50,
        tol=1e-4,
        relative=relative,
        reach=solver_options.REACH,
        ridge_init=solver_options.LAMBDA_INIT,
        ridge_max=solver_options.LAMBDA_MAX,
        kappa_threshold=solver_options.KAPPA_THRESHOLD,
    )
    return found._replace(**changes)


def reference_scales(weight, group_size, rule):
    groups = weight.double().split(group_size, dim=1)
    return torch.stack(
        [reference.fit_groups(group, rule).abs().sort(-1, descending=True).values for group in groups], dim=1
    )


def check_solver(weight, group_size, rule):
    expected = reference_scales(weight, group_size, rule)
    found = triton_solver.fit(weight, group_size, rule)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    scales = solver._round(expected, torch.float16, tied=rule.direction is not None)
    planes = TritPlanes(solver.search_trits(weight.double(), scales, group_size), scales, group_size)
    width = packed_width(weight.shape[1], group_size, rule.planes, "nibble")
    packed, error, norm = triton_solver.encode(weight, scales, group_size, width)
    assert torch.equal(packed, planes.pack("nibble")["weight"])
    assert error == pytest.approx(
        (planes.dequantize(torch.float64) - weight).square().sum().item(), rel=1e-9, abs=1e-30
    )
    assert norm == pytest.approx(weight.double().square().sum().item(), rel=1e-12)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("multistart", [False, True])
def test_solver_equals_the_reference(planes, multistart):
    weight = gaussian(3, 150, seed=planes)
    weight[1, :64] = 0
    check_solver(weight, 64, rule(planes, multistart=multistart))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_solver_takes_every_type(dtype):
    check_solver(gaussian(3, 70, dtype=dtype), 32, rule(2))


def test_tied_and_relative():
    check_solver(gaussian(3, 70), 32, rule(2, tied=True))
    check_solver(gaussian(3, 70) * 0.01, 32, rule(2, relative=True))
    check_solver(gaussian(3, 70), 32, rule(2, tied=True, multistart=True))


def test_ridge_grows_when_ill_conditioned():
    check_solver(gaussian(3, 64), 32, rule(2, kappa_threshold=1e6))
    check_solver(gaussian(3, 64), 32, rule(3, kappa_threshold=3.0))
    check_solver(gaussian(3, 64), 32, rule(3, ridge_init=0.5))


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_tiny_groups(length):
    check_solver(gaussian(4, 3 * length + length // 2, seed=length), length, rule(2))


def test_solver_reads_strided_weights():
    weight = gaussian(40, 8).T[:, :36]
    check_solver(weight[1:7], 16, rule(2))


EXAMPLE = torch.tensor([[0.9, -0.45, 0.05, 0.4, -1.0, 0.62, -0.1, 0.3]], dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 5, 50])
def test_worked_example_scales(iterations):
    expected = [(0.23875, 0.23875), (0.351064, 0.320851), (0.45, 0.37), (0.52, 0.408333), (0.555217, 0.39913)]
    found = triton_solver.fit(EXAMPLE, 8, rule(2, max_iter=iterations))
    assert found.flatten().tolist() == pytest.approx(expected[min(iterations, 5) - 1], abs=1e-6)


def test_worked_example_bytes():
    scales = triton_solver.fit(EXAMPLE, 8, rule(2))
    packed, error, norm = triton_solver.encode(EXAMPLE, scales, 8, 4)
    assert packed.flatten().tolist() == [0x08, 0x73, 0x24, 0x55]
    assert (error / norm) ** 0.5 == pytest.approx(0.1013106, abs=1e-6)


def test_damaged_weights_are_refused():
    for value in (math.nan, math.inf):
        weight = gaussian(2, 32)
        weight[1, 3] = value
        with pytest.raises(ValueError, match="NaN or an infinite"):
            triton_solver.fit(weight, 16, rule(2))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_matrix_on_the_device_is_that_of_main_memory():
    weight = torch.randn(64, 300, generator=generator(), dtype=torch.float32)
    for options in ({}, {"planes": 3}, {"scale_mode": "tied"}, {"multistart": True}):
        expected, found = (solver.quantize_matrix(w, **options) for w in (weight, weight.cuda()))
        assert (found.packed.cpu() != expected.packed).double().mean() < 1e-5
        assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-6)
