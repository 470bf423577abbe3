import math
import re
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import tensors
from helpers.literal_ptqtp import nearest_trits as literal_trits
from helpers.literal_ptqtp import ptqtp, ridge_scales
from helpers.pairwise import pairwise
from hypothesis import given
from hypothesis import strategies as st

from hf_rb.io import native as _native
from hf_rb.quantizers.ptqtp import solve
from hf_rb.quantizers.ptqtp import solver_c as native
from hf_rb.quantizers.ptqtp.reference import nearest_trits
from hf_rb.quantizers.ptqtp.solver import quantize_matrix


gaussian = partial(tensors.gaussian, dtype=torch.float64)

# Weights of 64 bits are solved by the reference in torch, weights of 32 and fewer by the compiled solver, if there is one.
EXAMPLE = torch.tensor([0.9, -0.45, 0.05, 0.4, -1.0, 0.62, -0.1, 0.3], dtype=torch.float64)


def exact(weight, group_size=128, **options):
    """Scales as the algorithm finds them, without rounding."""
    return solve(weight, group_size, scale_dtype=torch.float64, **options)


def relative_error(planes, weight):
    return ((planes.dequantize(torch.float64) - weight).norm() / weight.double().norm()).item()


# Worked example 1: the iterations, from the literal reference, which the fast solver is then held against.


def test_worked_example_iterations():
    rows = [
        (0.23875, 0.23875, 0.83535, 0.49483281),
        (0.351064, 0.320851, 0.29728085, 0.18023748),
        (0.45, 0.37, 0.0875, 0.0748),
        (0.52, 0.408333, 0.03658333, 0.03211667),
        (0.555217, 0.39913, 0.02729565, 0.02729565),
    ]
    for (scales, after_scales, after_trits, _), expected in zip(ptqtp(EXAMPLE)[2], rows, strict=False):
        got = (*scales.tolist(), after_scales, after_trits)
        assert got == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 5, 50])
def test_worked_example_scales(iterations):
    expected = [(0.23875, 0.23875), (0.351064, 0.320851), (0.45, 0.37), (0.52, 0.408333), (0.555217, 0.39913)]
    scales = exact(EXAMPLE[None], 8, max_iter=iterations).scales.flatten().tolist()
    assert scales == pytest.approx(expected[min(iterations, 5) - 1], abs=1e-6)


def test_worked_example_result():
    planes = exact(EXAMPLE[None], 8)
    assert planes.trits.tolist() == [[[1, 0, 0, 0, -1, 1, -1, 0]], [[1, -1, 0, 1, -1, 0, 1, 1]]]
    expected = [0.954348, -0.39913, 0, 0.39913, -0.954348, 0.555217, -0.156087, 0.39913]
    assert planes.dequantize(torch.float64).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert relative_error(planes, EXAMPLE) == pytest.approx(0.1013106, abs=1e-6)


# The fast solver is the literal one.


@pytest.mark.parametrize("length", [1, 2, 7, 64, 128])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_equals_the_literal_algorithm(length, scale):
    weight = gaussian(12, length, seed=length) * scale
    weight[0, 0] = 0
    planes = exact(weight, 128, tol_mode="absolute_strict")
    for row in range(len(weight)):
        scales, trits, _ = ptqtp(weight[row])
        order = scales.abs().argsort(descending=True, stable=True)
        torch.testing.assert_close(planes.scales[row, 0], scales.abs()[order], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(planes.dequantize(torch.float64)[row], scales @ trits, rtol=1e-9, atol=1e-13)


# Multiples of 1/8 are exact in both types, so that every distance, and every tie, is what it is in exact arithmetic.
eighths = st.integers(-24, 24).map(lambda n: n / 8)


@given(st.lists(eighths, min_size=1, max_size=12), st.lists(eighths, min_size=1, max_size=2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trit_search_is_the_nine_way_search(dtype, weights, scales):
    weights, scales = torch.tensor(weights, dtype=dtype), torch.tensor(scales, dtype=dtype)
    found = nearest_trits(weights[None], scales[None].double())[:, 0]
    expected = literal_trits(weights, scales) * (scales != 0)[:, None]  # a plane without a scale has no trits
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trit_search_on_gaussian_weights(dtype):
    weights = gaussian(50, 128, dtype=dtype)
    scales = gaussian(50, 2, seed=1).abs()
    scales[:10, 1] = scales[:10, 0]  # the degenerate state of the first iteration
    found = nearest_trits(weights, scales)
    for row in range(50):
        assert torch.equal(found[:, row].double(), literal_trits(weights[row].double(), scales[row]))


def test_first_tie_breaks_as_documented():
    # Equal scales: a zero takes (-1, 1), +a takes (0, 1), -a takes (-1, 0).
    found = nearest_trits(torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    assert found[:, 0].T.tolist() == [[-1, 1], [0, 1], [-1, 0]]


# Invariants.


def test_error_never_increases():
    for seed in range(20):
        previous = math.inf
        for _, after_scales, after_trits, _ in ptqtp(gaussian(64, seed=seed))[2]:
            assert after_scales <= previous + 1e-9 and after_trits <= after_scales + 1e-12
            previous = after_trits


def test_result_is_a_fixed_point_and_solves_the_normal_equations():
    weight = gaussian(40, 128)
    planes = exact(weight)
    for row in range(40):
        trits, scales = planes.trits[:, row].double(), planes.scales[row, 0]
        again, _ = ridge_scales(weight[row], trits, 1e-8)
        assert (again - scales).abs().max() < 1e-6
        assert torch.equal(literal_trits(weight[row], again), trits)
        assert (trits @ (weight[row] - scales @ trits)).abs().max() < 1e-6


@pytest.mark.parametrize("planes", [1, 2])
def test_ternary_weights_are_exact(planes):
    trits = torch.randint(-1, 2, (30, 128), generator=torch.Generator().manual_seed(0)).double()
    weight = trits * torch.rand(30, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    assert relative_error(exact(weight, planes=planes), weight) < 1e-6


@pytest.mark.parametrize("factor", [2.0**-12, 1e-3, 7.3])
def test_scale_equivariance(factor):
    weight = gaussian(20, 256)
    one, other = (exact(w, tol_mode="relative") for w in (weight, factor * weight))
    assert torch.equal(one.trits, other.trits)
    torch.testing.assert_close(other.scales, factor * one.scales, rtol=1e-9, atol=0)


def test_negated_weights_are_negated():
    # Which basin a group falls into depends on the ties of the first iteration, which are not symmetric.
    weight = gaussian(20, 256)
    one, other = exact(weight), exact(-weight)
    close = torch.isclose(one.scales, other.scales, rtol=1e-6).all(-1)
    assert relative_error(one, weight) == pytest.approx(relative_error(other, -weight), rel=0.02)
    changed = (one.trits == -other.trits).unflatten(-1, (2, 128)).all(-1).all(0)
    assert torch.equal(changed, close)


def test_nine_symmetric_levels():
    planes = exact(gaussian(10, 128))
    for row, (a, b) in zip(planes.dequantize(torch.float64), planes.scales[:, 0].tolist(), strict=True):
        levels = torch.tensor([0, a, b, a + b, a - b], dtype=torch.float64)
        levels = torch.cat([levels, -levels])
        assert (row[:, None] - levels).abs().min(-1).values.max() < 1e-12
        assert len(row.unique()) <= 9


def test_first_scales_and_condition_number():
    weight = gaussian(128)
    signs = torch.where(weight >= 0, 1.0, -1.0).double()
    scales, kappa = ridge_scales(weight, torch.stack([signs, signs]), 1e-8)
    expected = weight.abs().sum().item() / (2 * 128 + 1e-8)
    assert scales.tolist() == pytest.approx([expected] * 2, rel=1e-12)
    assert exact(weight[None], max_iter=1).scales.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-12)
    assert kappa == pytest.approx(256 / 1e-8, rel=1e-6)


def test_ridge_grows_when_ill_conditioned(monkeypatch):
    weight = gaussian(20, 128)
    expected = exact(weight)
    monkeypatch.setattr("hf_rb.quantizers.ptqtp.options.KAPPA_THRESHOLD", 1e6)
    planes = exact(weight)
    for row in range(20):
        scales, _, history = ptqtp(weight[row], kappa_threshold=1e6)
        assert history[0][3] > 1e-8
        torch.testing.assert_close(planes.scales[row, 0], scales.abs().sort(descending=True).values, rtol=1e-9, atol=0)
    torch.testing.assert_close(planes.scales, expected.scales, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("group_size", "low", "high"), [(64, 0.160, 0.165), (128, 0.160, 0.170), (256, 0.164, 0.170)])
def test_error_on_gaussian_weights(group_size, low, high):
    weight = gaussian(512, 1024)
    planes = solve(weight, group_size)
    assert low < relative_error(planes, weight) < high
    for plane in planes.trits:
        assert (plane == 0).double().mean().item() == pytest.approx(0.37, abs=0.04)


def test_error_of_one_plane_and_of_tied_planes():
    weight = gaussian(256, 1024)
    assert relative_error(solve(weight, planes=1), weight) == pytest.approx(0.430, abs=0.005)
    tied = solve(weight, scale_mode="tied")
    assert relative_error(tied, weight) == pytest.approx(0.1696, abs=0.003)
    assert torch.equal(tied.scales[..., 0].double(), 3 * tied.scales[..., 1].double())
    student = torch.distributions.StudentT(5.0)
    torch.manual_seed(0)
    heavy = student.sample((256, 1024)).double()
    assert relative_error(solve(heavy), heavy) == pytest.approx(0.2047, abs=0.01)


def test_permuted_weights_permute_the_trits():
    weight = gaussian(10, 128)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    one, other = exact(weight), exact(weight[:, order])
    assert torch.equal(one.trits[:, :, order], other.trits)
    torch.testing.assert_close(one.scales, other.scales, rtol=1e-12, atol=0)


# What is stored.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_stored_scales_are_canonical_and_the_trits_fit_them(dtype):
    weight = (gaussian(8, 300) * 0.02).to(dtype)
    planes = solve(weight)
    assert planes.scales.dtype == torch.float16 and planes.scales.shape == (8, 3, 2)
    assert (planes.scales[..., 0] >= planes.scales[..., 1]).all() and (planes.scales >= 0).all()
    for row in range(8):
        for group, columns in enumerate([slice(0, 128), slice(128, 256), slice(256, 300)]):
            found = literal_trits(weight[row, columns].double(), planes.scales[row, group].double())
            assert torch.equal(planes.trits[:, row, columns].double(), found)


def test_zero_groups_stay_zero():
    weight = gaussian(4, 256)
    weight[1, :128] = 0
    planes = solve(weight)
    assert not planes.scales[1, 0].any() and not planes.trits[:, 1, :128].any()
    assert not solve(torch.zeros(3, 5)).dequantize().any()


def test_short_last_group_is_solved_on_its_length():
    weight = gaussian(16, 192)
    planes, last = solve(weight), solve(weight[:, 128:])
    assert planes.scales.shape == (16, 2, 2)
    assert torch.equal(planes.scales[:, 1:], last.scales) and torch.equal(planes.trits[:, :, 128:], last.trits)


def test_result_does_not_depend_on_chunks_or_threads(monkeypatch):
    weight = gaussian(64, 300)
    expected = solve(weight)
    for chunk in (300, 1000):
        monkeypatch.setattr("hf_rb.quantizers.ptqtp.reference.CHUNK", chunk)
        found = solve(weight)
        assert torch.equal(found.trits, expected.trits) and torch.equal(found.scales, expected.scales)


def test_solver_leaves_the_number_of_threads():
    before = torch.get_num_threads()
    solve(gaussian(4, 128))
    assert torch.get_num_threads() == before


def test_parameters_and_inference_tensors_are_solved():
    weight = gaussian(4, 128)
    expected = solve(weight)
    assert torch.equal(solve(torch.nn.Parameter(weight)).trits, expected.trits)
    with torch.inference_mode():
        assert torch.equal(solve(weight.clone()).trits, expected.trits)


def test_small_weights_are_solved_again_with_the_relative_rule():
    weight = gaussian(64, 256)
    expected = exact(weight, tol_mode="relative")
    small = exact(1e-4 * weight)
    assert small.resolved and torch.equal(small.trits, expected.trits)
    strict = exact(1e-4 * weight, tol_mode="absolute_strict")
    assert not strict.resolved and relative_error(strict, 1e-4 * weight) > relative_error(small, 1e-4 * weight) * 1.02
    # 30 x tol against the median scale: about 1.0 for standard normal weights.
    assert not exact(0.004 * weight).resolved and exact(0.002 * weight).resolved


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers(value):
    weight = gaussian(4, 128)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="NaN or an infinite value"):
        solve(weight)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(4), {}, "floating matrix"),
        (torch.zeros(4, 4, dtype=torch.int8), {}, "floating matrix"),
        (torch.ones(4, 4), {"planes": 4}, "planes must be 1, 2 or 3"),
        (torch.ones(4, 4), {"tol_mode": "none"}, "tol_mode must be"),
        (torch.ones(4, 4), {"planes": 1, "scale_mode": "tied"}, "scale_mode must be"),
        (torch.full((4, 4), 1e6), {}, "does not fit torch.float16"),
    ],
)
def test_refusals(weight, options, message):
    with pytest.raises(ValueError, match=message):
        solve(weight, **options)


@pytest.fixture(params=_native.supported())
def variant(request, monkeypatch):
    """The compiled solver, for each instruction set."""
    monkeypatch.setenv("HF_RB_NATIVE", request.param)
    if native.solver(torch.zeros(1, 1)) is None:
        pytest.skip("there is no compiler")


def reference(function, *arguments, **options):
    """The same call without the compiled solver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_RB_NATIVE", "off")
        return function(*arguments, **options)


# The compiled solver is the reference.


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_compiled_group_that_is_longer_than_a_row(variant, planes):
    weight = gaussian(4, 40, dtype=torch.float32)
    found = quantize_matrix(weight, group_size=1 << 45, planes=planes)
    expected = quantize_matrix(weight, group_size=40, planes=planes)
    assert torch.equal(found.packed, expected.packed) and torch.equal(found.scales, expected.scales)


def test_compiled_worked_example(variant):
    expected = [(0.23875, 0.23875), (0.351064, 0.320851), (0.45, 0.37), (0.52, 0.408333), (0.555217, 0.39913)]
    for iterations in (1, 2, 3, 4, 5, 50):
        scales = exact(EXAMPLE[None].float(), 8, max_iter=iterations).scales.flatten().tolist()
        assert scales == pytest.approx(expected[min(iterations, 5) - 1], abs=1e-6)
    planes = exact(EXAMPLE[None].float(), 8)
    assert planes.trits.tolist() == [[[1, 0, 0, 0, -1, 1, -1, 0]], [[1, -1, 0, 1, -1, 0, 1, 1]]]
    assert quantize_matrix(EXAMPLE[None].float(), group_size=8).packed.numpy().tobytes().hex() == "08732455"


MODES = [
    {"planes": 1},
    {"planes": 2},
    {"planes": 2, "scale_mode": "tied"},
    {"planes": 2, "multistart": True},
    {"planes": 2, "scale_mode": "tied", "multistart": True},
    {"planes": 2, "tol_mode": "relative", "max_iter": 3},
    {"planes": 3},
    {"planes": 3, "multistart": True},
]


@pairwise(
    ("variant", _native.supported()),
    ("options", MODES),
    ("dtype", [torch.float32, torch.bfloat16, torch.float16]),
    ("shape, group_size", [((64, 300), 128), ((3, 7), 128), ((37, 64), 1), ((16, 257), 256)]),
    indirect=["variant"],
)
def test_compiled_solver_is_the_reference(variant, options, dtype, shape, group_size):
    weight = (gaussian(*shape, seed=shape[1]) * 0.02).to(dtype)
    weight[0, : shape[1] // 2] = 0
    found, expected = (
        call(solve, weight, group_size, **options) for call in (lambda f, *a, **o: f(*a, **o), reference)
    )
    assert (found.trits != expected.trits).double().mean() <= 1e-5  # ties
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-3, atol=0)
    assert found.resolved == expected.resolved


def test_compiled_solver_on_many_weights(variant):
    weight = gaussian(1024, 1024, dtype=torch.float32) * 0.02
    found, expected = solve(weight), reference(solve, weight)
    assert (found.trits != expected.trits).double().mean() <= 1e-5
    assert (found.scales != expected.scales).double().mean() <= 1e-5


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quantize_matrix_packs_what_solve_finds(options, dtype):
    weight = gaussian(20, 300).to(dtype)
    found, planes = quantize_matrix(weight, **options), solve(weight, **options)
    assert torch.equal(found.packed, planes.pack("nibble")["weight"])
    assert torch.equal(found.scales, planes.scales) and found.resolved == planes.resolved
    assert found.relative_error == pytest.approx(relative_error(planes, weight), rel=1e-4)


def test_quantize_matrix_of_zeros():
    found = quantize_matrix(torch.zeros(3, 5))
    assert found.relative_error == 0 and not found.scales.any() and not solve(torch.zeros(3, 5)).trits.any()


@pytest.mark.parametrize("options", [{}, {"planes": 3, "multistart": True}, {"scale_mode": "tied"}], ids=str)
def test_compiled_solver_does_not_depend_on_threads_or_blocks(variant, options, monkeypatch):
    weight = gaussian(130, 300, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count, block in [(1, native.BLOCK), (2, native.BLOCK), (3, 1000), (7, 300)]:
            monkeypatch.setattr(native, "BLOCK", block)
            torch.set_num_threads(count)
            results.append(quantize_matrix(weight, **options))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.packed, results[0].packed) and torch.equal(result.scales, results[0].scales)
        assert result.relative_error == results[0].relative_error


def test_compiled_solver_lets_other_threads_run(variant):
    weight = gaussian(2048, 2048, dtype=torch.float32)
    thread = threading.Thread(target=solve, args=(weight,), kwargs={"planes": 3, "multistart": True})
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 20


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_compiled_solver_refuses_what_is_not_a_number(variant, value):
    weight = gaussian(40, 300, dtype=torch.float32)
    for place in [(0, 0), (39, 299), (17, 130)]:
        damaged = weight.clone()
        damaged[place] = value
        with pytest.raises(ValueError, match="NaN or an infinite value"):
            solve(damaged)


def test_strided_weights(variant):
    weight = gaussian(300, 64, dtype=torch.float32)
    assert torch.equal(solve(weight.T).trits, solve(weight.T.contiguous()).trits)


# What is not from the paper: three planes, more starts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_planes_and_more_starts_are_better(dtype):
    weight = gaussian(128, 1024, dtype=dtype)
    errors = [quantize_matrix(weight, **options).relative_error for options in MODES]
    one, two, tied, two_starts, tied_starts, _, three, three_starts = errors
    assert one > 0.4 and 0.160 < two < 0.170
    assert two_starts < 0.985 * two and tied_starts < tied
    assert three == pytest.approx(0.061, abs=0.001) and three_starts < 0.98 * three


def test_three_planes_solve_the_normal_equations():
    weight = gaussian(20, 128)
    planes = exact(weight, planes=3)
    assert (planes.scales.diff(dim=-1) <= 0).all() and (planes.scales >= 0).all()
    for row in range(20):
        trits = planes.trits[:, row].double()
        assert (trits @ (weight[row] - planes.scales[row, 0] @ trits)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_three_planes_on_very_short_groups(dtype, length):
    """The matrix of the normal equations has not full rank."""
    weight = gaussian(30, length, dtype=dtype)
    planes = exact(weight, planes=3, multistart=True)
    assert planes.scales.isfinite().all() and relative_error(planes, weight) < 0.2


def test_two_ternary_planes_are_recovered_from_more_starts():
    generator = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (2, 60, 128), generator=generator).double()
    weight = 3 * trits[0] + trits[1]
    recovered = [
        (exact(weight, multistart=multistart).dequantize(torch.float64) - weight).abs().amax(1) < 1e-6
        for multistart in (False, True)
    ]
    assert recovered[0].double().mean() < 0.5 < recovered[1].double().mean()


def test_speed():
    """
    20 million weights a second on one core, and 0.75 million for the reference; in processor time, since a test machine is not
    idle.
    """
    weight = (gaussian(1024, 2048) * 0.02).bfloat16()
    for call, floor in [(solve, 20e6), (lambda weight: reference(solve, weight), 0.75e6)]:
        if call is solve and native.solver(weight) is None:
            continue
        call(weight[:16])
        seconds = []
        for _ in range(3):
            start = time.process_time()
            call(weight)
            seconds.append(time.process_time() - start)
        assert weight.numel() / min(seconds) > floor


def memory(which):
    """Megabytes of this process: `VmRSS` now, `VmHWM` at the highest since the peak was reset."""
    return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure")
def test_memory():
    """Below 256 MB beside the result on two cores, whatever the size of the layer."""
    weight = (gaussian(2048, 4096, dtype=torch.float32) * 0.02).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        planes = solve(weight)
        extra = memory("VmHWM") - before
    finally:
        torch.set_num_threads(threads)
    assert extra - (planes.trits.nbytes + planes.scales.nbytes) / 2**20 < 256
