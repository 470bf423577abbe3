import math
from functools import partial

import pytest
import torch
from helpers import tensors
from hypothesis import given
from hypothesis import strategies as st

from hf_rb.quantizers.d2quant.maths.dsq import fit_dsq, round_to_nearest


gaussian = partial(tensors.gaussian, dtype=torch.float64)

EXAMPLE = torch.tensor(
    [[0.30, -0.80, 0.10, 0.45], [-0.20, 0.90, 0.05, -0.60], [0.25, -0.30, -0.15, 0.70]], dtype=torch.float64
)


def value(fitted):
    rows = (fitted.row_scales.movedim(-1, 0).unsqueeze(-1) * fitted.signs).sum(0)
    return rows * fitted.column_scale.unsqueeze(-2)


def relative_error(quantized, weight):
    return ((quantized - weight).norm() / weight.norm()).item()


def test_worked_example():
    fitted = fit_dsq(EXAMPLE, 2)
    assert fitted.column_scale.tolist() == pytest.approx([0.228704, 0.635636, 0.109508, 0.637207], abs=1e-6)
    rows = [[0.988303, 0.274069], [1.168558, 0.244298], [0.789397, 0.318445]]
    assert fitted.row_scales.flatten().tolist() == pytest.approx(sum(rows, []), abs=1e-6)
    assert fitted.signs.tolist() == [
        [[1, -1, 1, 1], [-1, 1, 1, -1], [1, -1, -1, 1]],
        [[1, -1, -1, -1], [1, 1, -1, 1], [1, 1, -1, 1]],
    ]
    expected = [0.28871, -0.802409, 0.078215, 0.455115, -0.211383, 0.898062, 0.101214, -0.588946]
    expected += [0.253368, -0.299354, -0.121318, 0.705925]
    assert value(fitted).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert fitted.objective[:4] == pytest.approx([0.01024664, 0.00882012, 0.00579777, 0.00579777], abs=1e-8)
    assert fitted.objective[-1] == pytest.approx(0.00438198, abs=1e-8)
    assert len(fitted.objective) == 1 + 3 * 15


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 3]), st.integers(1, 9), st.integers(1, 24))
def test_no_half_step_increases_the_error(seed, planes, rows, columns):
    block = gaussian(rows, columns, seed=seed) * gaussian(columns, seed=seed + 1).exp()
    for weights in (None, gaussian(columns, seed=seed + 2).exp()):
        fitted = fit_dsq(block, planes, iters=8, weights=weights)
        for before, after in zip(fitted.objective, fitted.objective[1:], strict=False):
            assert after <= before * (1 + 1e-12) + 1e-24
        squares = (value(fitted) - block).square() * (1 if weights is None else weights)
        torch.testing.assert_close(squares.sum().item(), fitted.objective[-1])


def test_weights_of_columns():
    """Equal weights change nothing, and others lower the error that they weigh; a column that counts nothing moves no other."""
    block = gaussian(32, 16) * gaussian(16, seed=1).exp()
    weights = (2 * gaussian(16, seed=2)).exp()
    plain, weighted, same = (fit_dsq(block, 2, weights=one) for one in (None, weights, torch.ones(16).double()))
    assert torch.equal(value(plain), value(same)) and plain.objective == same.objective
    errors = [((value(fitted) - block).square() * weights).sum().item() for fitted in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]
    without = weights.clone()
    without[5] = 0
    others = torch.arange(16) != 5
    alone = value(fit_dsq(block[:, others], 2, weights=weights[others]))
    torch.testing.assert_close(value(fit_dsq(block, 2, weights=without))[:, others], alone)


def test_dependent_planes_keep_the_error_from_growing():
    # Rows of one magnitude: both planes are equal or opposite, and the normal equations singular.
    block = torch.where(gaussian(6, 16) > 0, 1.0, -1.0).float()
    fitted = fit_dsq(block, 3)
    assert fitted.objective[-1] < 1e-10 and all(map(math.isfinite, fitted.objective))


def test_scaling_rows_and_columns_inversely_changes_nothing():
    fitted = fit_dsq(EXAMPLE, 2)
    scaled = fitted._replace(column_scale=4 * fitted.column_scale, row_scales=fitted.row_scales / 4)
    assert torch.equal(value(scaled), value(fitted))


@pytest.mark.parametrize("seed", [0, 1])
def test_finds_what_has_its_form(seed):
    rows = torch.rand(64, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.tensor([0.5, 0.1]) + torch.tensor([0.5, 0.2]) * rows
    columns = gaussian(32, seed=seed).exp()
    signs = gaussian(2, 64, 32, seed=seed + 1).sign()
    block = (rows.T[..., None] * signs).sum(0) * columns
    assert relative_error(value(fit_dsq(block, 2)), block) < 1e-6


def test_one_plane_without_columns_is_the_binary_least_squares():
    # With |x| the same in every row, the columns come out as those values and a row scale is the mean of |x| / c: 1.
    block = gaussian(8, 16).sign() * gaussian(16, seed=1).abs()
    fitted = fit_dsq(block, 1)
    torch.testing.assert_close(value(fitted), block)
    # One column for itself: r is the mean of |x|.
    row = gaussian(1, 16)
    start = fit_dsq(row.T, 1, iters=1)
    torch.testing.assert_close(value(start), row.T)


def test_binary_row_scale_is_the_mean():
    from hf_rb.quantizers.d2quant.maths.dsq import _fit_rows

    block = gaussian(8, 16)
    rows, _ = _fit_rows(block, torch.ones(16).double(), torch.ones(8, 1).double(), block.sign()[None])
    torch.testing.assert_close(rows.squeeze(-1), block.abs().mean(-1))


def test_independent_blocks():
    blocks = gaussian(3, 5, 16)
    together = fit_dsq(blocks, 2)
    for index, block in enumerate(blocks):
        alone = fit_dsq(block, 2)
        torch.testing.assert_close(together.column_scale[index], alone.column_scale)
        torch.testing.assert_close(together.row_scales[index], alone.row_scales)
        assert torch.equal(together.signs[:, index], alone.signs)


# Relative errors of a matrix 256 x 128 (worked example 2).
@pytest.mark.parametrize(("planes", "expected"), [(2, 0.335), (3, 0.185)])
def test_gaussian_weights(planes, expected):
    weight = gaussian(256, 128, dtype=torch.float32)
    assert relative_error(round_to_nearest(weight, planes).dequantize(), weight) == pytest.approx(expected, abs=0.004)


def test_columns_of_different_size():
    weight = gaussian(256, 128, dtype=torch.float32) * gaussian(128, seed=1, dtype=torch.float32).exp()
    from hf_rb.quantizers.d2quant.maths.grids import round_to_nearest as affine

    for planes in (2, 3):
        dual = relative_error(round_to_nearest(weight, planes).dequantize(), weight)
        assert dual < 0.75 * relative_error(affine(weight, planes).dequantize(), weight)


def test_stored_scales():
    weight = gaussian(16, 40, dtype=torch.float32)
    codes = round_to_nearest(weight, 2, 16)
    assert codes.signs.shape == (2, 16, 40) and set(codes.signs.unique().tolist()) == {-1, 1}
    assert codes.row_scale.shape == (16, 3, 2) and codes.row_scale.dtype == torch.float16
    assert (codes.shape, codes.bits) == ((16, 40), 2)
    for part in codes.column_scale.split(16):
        assert part.log().mean().item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(codes.dequantize(), codes.planes() * codes.column_scale, rtol=0, atol=0)
    alone = round_to_nearest(weight[:, 32:], 2, 16)  # the short last group
    assert torch.equal(codes.signs[:, :, 32:], alone.signs)


def test_zero_columns_rows_and_blocks():
    weight = gaussian(8, 16, dtype=torch.float32)
    weight[:, 3] = 0
    weight[2] = 0
    codes = round_to_nearest(weight, 2, 16)
    assert codes.column_scale.isfinite().all() and (codes.column_scale == 0).nonzero().flatten().tolist() == [3]
    assert not codes.dequantize()[:, 3].any() and codes.dequantize()[2].abs().max() < 1e-5
    assert codes.column_scale[codes.column_scale > 0].log().mean().item() == pytest.approx(0, abs=1e-6)
    assert not round_to_nearest(torch.zeros(4, 8), 3, 8).dequantize().any()


def test_refuses_values_that_are_no_numbers():
    with pytest.raises(ValueError, match="NaN or an infinite"):
        round_to_nearest(torch.full((2, 8), math.nan), 2, 8)
