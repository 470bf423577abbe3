"""The compiled loops of D²Quant against those in torch."""

import pytest
import torch
from helpers.pairwise import pairwise
from helpers.tensors import gaussian

from hf_rb.io import native as _native
from hf_rb.quantizers.d2quant.maths import dsq, gptq, grids, native


@pytest.fixture(scope="module")
def problem():
    """A weight whose rows do not fill their lanes, with a row and a column that are special, and its two statistics."""
    weight = 0.02 * gaussian(37, 200)
    weight[3] = 0
    weight[:, 5] *= 30
    inputs = gaussian(1024, 200, seed=1) @ gaussian(200, 200, seed=2) * gaussian(200, seed=3).exp()
    statistics = gptq.InputStatistics(200, cross=True)
    statistics.add(inputs, inputs + 0.03 * inputs @ gaussian(200, 200, seed=4))
    return weight, statistics.hessian, statistics.cross


VARIANTS = _native.supported()


@pytest.fixture(params=VARIANTS)
def both(request, monkeypatch):
    """Returns a function that runs another one with the compiled loops of an instruction set and with torch."""
    if _native.load(native.SOURCE, request.param) is None:
        pytest.skip("there is no C compiler")

    def run(function):
        results = []
        for variant in (request.param, "off"):
            monkeypatch.setenv("HF_RB_NATIVE", variant)
            results.append(function())
        return results

    return run


@pairwise(("both", VARIANTS), ("bits", [2, 3, 4]), ("group_size", [64, 128, 7]), indirect=["both"])
def test_compiled_clip_search_is_that_in_torch(both, problem, bits, group_size):
    compiled, reference = both(lambda: grids.round_to_nearest(problem[0], bits, group_size))
    # Shares with nearly the same error may change places.
    same = (compiled.scale == reference.scale) & (compiled.zero == reference.zero)
    assert same.float().mean() > 0.995
    errors = [(codes.dequantize() - problem[0]).abs().pow(2.4).sum().item() for codes in (compiled, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@pairwise(("both", VARIANTS), ("planes", [1, 2, 3]), ("weighted", [False, True]), indirect=["both"])
def test_compiled_dual_scales_are_those_in_torch(both, problem, planes, weighted):
    weights = gaussian(64, seed=5).exp() if weighted else None
    (rows, columns), (expected_rows, expected_columns) = both(
        lambda: dsq.fit_levels(problem[0][:, :64], planes, weights=weights)
    )
    torch.testing.assert_close(columns, expected_columns, rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(rows, expected_rows, rtol=5e-3, atol=1e-6)
    compiled, reference = both(lambda: dsq.round_to_nearest(problem[0], planes, 64))
    errors = [(codes.dequantize() - problem[0]).norm().item() for codes in (compiled, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pairwise(
    ("both", VARIANTS),
    ("dual, weighting", [(False, "none"), (True, "none"), (True, "hessian")]),
    ("with_cross", [False, True]),
    indirect=["both"],
)
def test_compiled_columns_are_those_in_torch(both, problem, dual, weighting, with_cross):
    weight, hessian, cross = problem
    arguments = weight, hessian, cross if with_cross else None
    (compiled, stats), (reference, expected) = both(
        lambda: gptq.quantize(*arguments, bits=2, group_size=64, dual=dual, dsq_weighting=weighting)
    )
    assert stats.output_error == pytest.approx(expected.output_error, rel=1e-2)
    # Where a weight lies between two levels, a rounding error changes what follows in its row, and with dual scales others.
    same = (compiled.dequantize() - reference.dequantize()).abs() < 1e-4
    first = gptq.group_aware_order(hessian.diagonal(), 64)[1][:64]
    assert same[:, first].float().mean() > 0.99
    assert same.float().mean() > {"none": 0.9 if dual else 0.99, "hessian": 0.85}[weighting]


def test_threads_change_nothing(problem):
    weight, hessian, cross = problem
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((dsq.fit_levels(weight, 2), grids.round_to_nearest(weight, 2, 64)))
    finally:
        torch.set_num_threads(threads)
    (rows, columns), affine = results[0]
    for (other_rows, other_columns), other in results[1:]:
        assert torch.equal(rows, other_rows) and torch.equal(columns, other_columns)
        assert torch.equal(affine.codes, other.codes) and torch.equal(affine.scale, other.scale)


def test_takes_float32_in_main_memory_only():
    assert native.solver(torch.zeros(2, dtype=torch.float64)) is None
    assert native.solver(torch.zeros(2, device="meta")) is None
