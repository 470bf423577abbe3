import pytest
import torch
from helpers.tensors import gaussian

from hf_rb.quantizers.d2quant.maths import dsq, grids
from hf_rb.quantizers.d2quant.maths.gptq import (
    InputStatistics,
    _invert_upper,
    _residual_factor,
    group_aware_order,
    inverse_factor,
    quantize,
)


def inputs(tokens, columns, seed=0):
    """Correlated inputs, some much larger than others."""
    mixed = gaussian(tokens, columns, seed=seed) @ gaussian(columns, columns, seed=seed + 1)
    return mixed * gaussian(columns, seed=seed + 2).exp()


@pytest.fixture(scope="module")
def problem():
    """A weight with a short last group, the inputs of the quantized model, and those of the original one."""
    quantized = inputs(512, 80)
    original = quantized + 0.03 * quantized @ gaussian(80, 80, seed=5)  # what was lost depends on what is there
    statistics = InputStatistics(80, cross=True)
    for start in range(0, 512, 128):
        statistics.add(quantized[start : start + 128].unflatten(0, (2, 64)), original[start : start + 128])
    return gaussian(24, 80, seed=9), statistics, quantized, original


def test_statistics(problem):
    _, statistics, quantized, original = problem
    torch.testing.assert_close(statistics.hessian, 2 / 512 * quantized.T @ quantized, rtol=1e-4, atol=1e-3)
    expected = 2 / 512 * (original - quantized).T @ quantized
    torch.testing.assert_close(statistics.cross, expected, rtol=1e-3, atol=1e-2)
    assert InputStatistics(4).cross is None
    with pytest.raises(ValueError, match="statistics have been read, so nothing can be added"):
        statistics.add(quantized, original)


# Against the algorithm column by column, in float64, with the same scales.


def literal(weight, hessian, cross, fit, groups, order, percdamp=0.01, alpha=0.25):
    """`fit(group, block)` returns `nearest(column, weights)`; the result is in the order of `order`."""
    weight, hessian = weight.double()[:, order], hessian.double()[order][:, order]
    hessian = hessian + percdamp * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(hessian.inverse(), upper=True)
    extra = torch.zeros_like(hessian)
    if cross is not None:
        extra = alpha * (cross.double()[order][:, order] @ upper.T).triu(1) @ upper
    result, first = torch.empty_like(weight), 0
    for group, length in groups:
        nearest = fit(group, weight[:, first : first + length])
        for column in range(first, first + length):
            current = weight[:, column].clone()
            result[:, column] = nearest(column - first, current)
            error = (current - result[:, column]) / upper[column, column]
            weight[:, column + 1 :] += torch.outer(current, extra[column, column + 1 :])
            weight[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
        first += length
    return result


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("with_cross", [False, True])
@pytest.mark.parametrize("act_order", ["gar", None])
def test_equals_the_literal_algorithm(problem, dual, with_cross, act_order):
    weight, statistics, _, _ = problem
    cross = statistics.cross if with_cross else None
    groups, order = group_aware_order(statistics.hessian.diagonal(), 32, act_order)
    codes, _ = quantize(
        weight, statistics.hessian, cross, bits=2, group_size=32, act_order=act_order, dual=dual, clip_search=False
    )

    def affine(group, block):
        grid = grids.fit_grid(block.float(), 2, clip_search=False)
        rounder = grid.rounder(torch.float64)
        return lambda column, weights: rounder.decode(rounder.encode(weights))

    def levels(group, block):
        rows, columns = dsq.fit_levels(block.float(), 2)
        values = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).double() @ rows.double().T  # (4, out)

        def nearest(column, weights):
            candidates = values * columns[column]
            return candidates.gather(0, (candidates - weights).abs().argmin(0, keepdim=True))[0]

        return nearest

    expected = literal(weight, statistics.hessian, cross, levels if dual else affine, groups, order)
    got = codes.dequantize()[:, order].double()
    # A rounding error turns a weight that lies between two levels, and then what follows it in its row.
    rows = ((got - expected).abs() < 1e-4).all(-1)
    assert rows.float().mean() >= 0.8
    columns = ((got - expected).abs() < 1e-4).float().mean()
    assert columns >= 0.95


@pytest.mark.parametrize("dual", [False, True])
def test_gptaq_without_a_difference_is_gptq(problem, dual):
    weight, statistics, quantized, _ = problem
    same = InputStatistics(80, cross=True)
    same.add(quantized, quantized)
    gptq, _ = quantize(weight, same.hessian, bits=2, group_size=32, dual=dual)
    gptaq, _ = quantize(weight, same.hessian, same.cross, bits=2, group_size=32, dual=dual)
    assert torch.equal(gptq.dequantize(), gptaq.dequantize())


@pytest.mark.parametrize("act_order", ["gar", None])
def test_gptq_of_independent_inputs_is_rounding(act_order):
    weight, hessian = gaussian(24, 80), torch.eye(80)
    codes, _ = quantize(weight, hessian, bits=3, group_size=32, act_order=act_order)
    rounded = grids.round_to_nearest(weight, 3, 32)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(codes, name), getattr(rounded, name))
    rounded = dsq.round_to_nearest(weight, 2, 32)
    for weighting in ("none", "hessian"):
        options = dict(act_order=act_order, dual=True, dsq_weighting=weighting)
        dual, _ = quantize(weight, hessian, bits=2, group_size=32, **options)
        for name in ("signs", "row_scale", "column_scale"):
            assert torch.equal(getattr(dual, name), getattr(rounded, name))


def output_error(codes, weight, data, target):
    return (data @ codes.dequantize().T - target @ weight.T).norm().item()


@pytest.mark.parametrize("dual", [False, True])
def test_each_method_loses_less_than_the_one_before(problem, dual):
    weight, statistics, quantized, original = problem
    rounded = dsq.round_to_nearest(weight, 2, 32) if dual else grids.round_to_nearest(weight, 2, 32)
    gptq, stats = quantize(weight, statistics.hessian, bits=2, group_size=32, dual=dual)
    gptaq, _ = quantize(weight, statistics.hessian, statistics.cross, bits=2, group_size=32, dual=dual, asym_alpha=1.0)
    on_same = [output_error(codes, weight, quantized, quantized) for codes in (rounded, gptq)]
    assert on_same[1] < 0.85 * on_same[0]
    assert stats.output_error == pytest.approx(on_same[1] / (quantized @ weight.T).norm().item(), rel=1e-2)
    on_original = [output_error(codes, weight, quantized, original) for codes in (gptq, gptaq)]
    assert on_original[1] < on_original[0]


def test_weighting_dual_scales_lowers_the_error_of_the_output():
    """Of a matrix whose inputs differ in size, on inputs that the Hessian has not seen."""
    weight, sizes = 0.02 * gaussian(48, 128), gaussian(128, seed=1).exp()
    mix = sizes[:, None] * (torch.eye(128) + 0.05 * gaussian(128, 128, seed=2))
    statistics, unseen = InputStatistics(128), gaussian(1024, 128, seed=4) @ mix.T
    statistics.add(gaussian(1024, 128, seed=3) @ mix.T)
    for bits in (2, 3):
        options = dict(bits=bits, group_size=64, dual=True)
        both = [quantize(weight, statistics.hessian, dsq_weighting=one, **options) for one in ("none", "hessian")]
        plain, weighted = (output_error(codes, weight, unseen, unseen) for codes, _ in both)
        assert weighted < 0.9 * plain


def test_scales_of_the_hessian_do_not_matter(problem):
    weight, statistics, _, _ = problem
    pairs = [(statistics.hessian, statistics.cross), (statistics.hessian * 64, statistics.cross * 64)]
    first, second = (quantize(weight, *pair, bits=2, group_size=32)[0] for pair in pairs)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)


def test_rows_are_independent(problem):
    weight, statistics, _, _ = problem
    both, _ = quantize(torch.cat([weight, 2 * weight]), statistics.hessian, bits=2, group_size=32)
    alone, _ = quantize(weight, statistics.hessian, bits=2, group_size=32)
    assert torch.equal(both.codes[:24], alone.codes) and torch.equal(both.scale[:24], alone.scale)


def test_group_aware_order():
    diagonal = torch.tensor([1.0, 5, 2, 3, 9, 3, 7, 8])  # groups of 3, the last with 2
    groups, order = group_aware_order(diagonal, 3)
    assert groups == [(1, 3), (2, 2), (0, 3)]
    assert order.tolist() == [4, 3, 5, 7, 6, 1, 2, 0]
    groups, order = group_aware_order(torch.ones(8), 3)
    assert groups == [(0, 3), (1, 3), (2, 2)] and order.tolist() == list(range(8))
    assert group_aware_order(diagonal, 3, None)[1].tolist() == list(range(8))


def test_inverse_factor():
    data = gaussian(64, 16, dtype=torch.float64)
    hessian = data.T @ data
    upper, percdamp = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close(upper.T @ upper, damped.inverse())
    assert percdamp == 0.01 and torch.equal(upper, upper.triu())
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inverse_factor(hessian, 0.01, order)[0], inverse_factor(hessian[order][:, order], 0.01)[0])


def test_inputs_that_are_always_zero(problem):
    weight, _, quantized, _ = problem
    quantized = quantized.clone()
    quantized[:, [3, 40]] = 0
    statistics = InputStatistics(80)
    statistics.add(quantized)
    for dual in (False, True):
        codes, stats = quantize(weight, statistics.hessian, bits=2, group_size=32, dual=dual)
        assert stats.dead == 2 and stats.percdamp == 0.01
        assert not codes.dequantize()[:, [3, 40]].any()
        assert stats.output_error < 0.3
    # The others in a group of theirs are of ordinary size, so that up projections can absorb them.
    assert 0.05 < codes.column_scale[:3].min() < 20
    _, stats = quantize(weight, torch.zeros(80, 80), bits=2, group_size=32)
    assert (stats.dead, stats.output_error) == (80, 0)


def test_few_tokens_and_singular_hessians(problem):
    weight = problem[0]
    few = InputStatistics(80)
    few.add(inputs(3, 80))
    codes, stats = quantize(weight, few.hessian, bits=2, group_size=32, percdamp=1e-9)
    assert stats.percdamp > 1e-9 and codes.dequantize().isfinite().all()
    with pytest.raises(ValueError, match="no Cholesky factor, not even with a damping of 1"):
        inverse_factor(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), 0.01)


def test_refusals(problem):
    weight, statistics, _, _ = problem
    with pytest.raises(ValueError, match=r"`hessian` must be \(80, 80\) .* got \(4, 4\)"):
        quantize(weight, torch.eye(4), bits=2)
    broken = statistics.hessian.clone()
    broken[3, 3] = torch.inf
    with pytest.raises(ValueError, match="`hessian` has a NaN or an infinite value: so had the inputs"):
        quantize(weight, broken, bits=2)
    with pytest.raises(ValueError, match="`act_order` must be 'gar' or None; got 'desc'"):
        quantize(weight, statistics.hessian, bits=2, act_order="desc")
    with pytest.raises(ValueError, match="NaN or an infinite"):
        quantize(torch.full_like(weight, torch.nan), statistics.hessian, bits=2)


@pytest.mark.parametrize("size", [40, 300, 777])
def test_triangular_products_in_blocks(size):
    matrix = gaussian(size, size, dtype=torch.float64).triu()
    matrix.diagonal().abs_().add_(size)
    torch.testing.assert_close(_invert_upper(matrix), matrix.inverse())
    cross = gaussian(size, size, seed=1, dtype=torch.float64)
    expected = 0.25 * (cross @ matrix.T).triu(1) @ matrix
    torch.testing.assert_close(_residual_factor(cross, matrix, 0.25), expected)
