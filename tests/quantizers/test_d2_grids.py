import pytest
import torch
from helpers.tensors import gaussian
from hypothesis import given
from hypothesis import strategies as st

from hf_rb.quantizers.d2quant.maths.grids import AffineCodes, fit_grid, round_to_nearest


def relative_error(codes, weight):
    return ((codes.dequantize() - weight).norm() / weight.norm()).item()


def literal_rtn(row, bits, shares=(1.0,)):
    """One group as the formula has it, without the rounding of its scale. Returns the levels that its weights get."""
    best, last = None, 2**bits - 1
    for share in shares:
        low, high = share * min(row.min().item(), 0), share * max(row.max().item(), 0)
        scale = (high - low) / last
        zero = round(-low / scale)
        levels = scale * (((row / scale).round() + zero).clamp(0, last) - zero)
        error = (row - levels).abs().pow(2.4).sum().item()
        if best is None or error < best[0]:
            best = error, levels
    return best[1]


SHARES = [1 - i / 100 for i in range(80)]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("clip_search", [False, True])
def test_is_the_formula_up_to_float16(bits, clip_search):
    weight = gaussian(6, 128)
    codes = round_to_nearest(weight, bits, clip_search=clip_search)
    shares = SHARES if clip_search else SHARES[:1]
    expected = torch.stack([literal_rtn(row, bits, shares) for row in weight.double()])
    assert relative_error(codes, weight) == pytest.approx(
        ((expected - weight).norm() / weight.norm()).item(), rel=2e-3
    )
    different = (codes.dequantize() - expected).abs() > 0.02
    assert different.float().mean() < 0.02  # a few weights lie within a rounding error of two levels


# Relative errors of a matrix 256 x 128 of Gaussian weights (worked example 2).
@pytest.mark.parametrize(("bits", "clip_search", "expected"), [(2, False, 0.502), (2, True, 0.370), (3, True, 0.187)])
def test_gaussian_weights(bits, clip_search, expected):
    weight = gaussian(256, 128)
    codes = round_to_nearest(weight, bits, clip_search=clip_search)
    assert relative_error(codes, weight) == pytest.approx(expected, abs=0.004)


def test_every_weight_takes_the_nearest_deployed_level():
    weight = gaussian(8, 96)
    codes = round_to_nearest(weight, 3, 32)
    steps, lowest = codes.scale.float(), codes.lowest.float()
    levels = torch.arange(8) * steps[..., None] + lowest[..., None]  # (out, groups, levels)
    distances = (weight.unflatten(1, (3, 32))[..., None] - levels[:, :, None]).abs().amin(-1)
    got = (codes.dequantize() - weight).abs().unflatten(1, (3, 32))
    torch.testing.assert_close(got, distances, rtol=0, atol=1e-6)


def test_dequantizes_as_the_kernels_do():
    codes = AffineCodes(
        torch.tensor([[0, 3, 1]], dtype=torch.uint8),
        torch.tensor([[0.1, 0.7]], dtype=torch.float16),
        torch.tensor([[1, 3]], dtype=torch.uint8),
        bits=2,
        group_size=2,
    )
    step = torch.tensor([0.1, 0.7], dtype=torch.float16).float()
    lowest = -(step * torch.tensor([1.0, 3.0])).half().float()
    assert codes.lowest.flatten().tolist() == lowest.tolist()
    expected = [lowest[0].item(), (3 * step[0] + lowest[0]).item(), (step[1] + lowest[1]).item()]
    assert codes.dequantize().flatten().tolist() == expected
    assert codes.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_short_last_group_has_a_grid_of_its_own():
    weight = gaussian(5, 72)
    codes = round_to_nearest(weight, 2, 32)
    assert codes.scale.shape == codes.zero.shape == (5, 3)
    alone = round_to_nearest(weight[:, 64:], 2, 32)
    assert torch.equal(codes.codes[:, 64:], alone.codes) and torch.equal(codes.scale[:, 2:], alone.scale)


def test_one_sided_and_empty_groups():
    weight = torch.stack([gaussian(16).abs() + 1, -gaussian(16).abs() - 1, torch.zeros(16)])
    codes = round_to_nearest(weight, 2, 16, clip_search=False)
    assert codes.zero.flatten().tolist() == [0, 3, 0]  # the range holds zero
    assert not codes.dequantize()[2].any() and not codes.codes[2].any()


def test_weights_too_small_for_float16_become_zero():
    assert not round_to_nearest(gaussian(2, 16) * 1e-9, 2, 16).dequantize().any()


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4]), st.floats(1e-3, 1e3))
def test_clip_search_never_loses(seed, bits, scale):
    weight = gaussian(4, 32, seed=seed) * scale
    errors = []
    for clip_search in (True, False):
        lost = round_to_nearest(weight, bits, 32, clip_search).dequantize() - weight
        errors.append(lost.abs().pow(2.4).sum(-1))
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_fit_takes_the_widest_of_equal_ranges():
    grid = fit_grid(torch.zeros(1, 4) + torch.tensor([0.0, 3.0, 1.0, 2.0]), 2)  # exact as it is
    assert (grid.scale.item(), grid.zero.item()) == (1.0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 5e4])
def test_refuses_values_that_scales_cannot_hold(bad):
    weight = gaussian(2, 8)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or an infinite|too large for scales in float16"):
        round_to_nearest(weight, 2, 8)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int8), torch.zeros(0, 2)])
def test_refuses_what_is_no_matrix(bad):
    with pytest.raises(ValueError, match="non-empty floating matrix"):
        round_to_nearest(bad, 2)
