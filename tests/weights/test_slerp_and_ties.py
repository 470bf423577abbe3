"""The pure functions of SLERP and TIES-Merging: worked numbers, edges and invariants."""

from math import pi, sqrt

import pytest
import torch
from helpers.raw_models import write
from hypothesis import given
from hypothesis import strategies as st

from hf_rb.weights import interpolate_tensors, merge_models
from hf_rb.weights.slerp import Slerp, angle_between, slerp_tensors
from hf_rb.weights.ties import Ties, Trim, disjoint_mean, kept_count, ties_tensors


def matrix(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestSlerp:
    def test_worked_example(self):
        start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        # A right angle: a third of the way is 30 degrees, sin 60 of the start and sin 30 of the end.
        torch.testing.assert_close(slerp_tensors(start, end, 1 / 3), torch.tensor([[sqrt(3) / 2, 1.0]]))
        assert angle_between([(start, end)]) == pytest.approx(pi / 2)

    @given(st.floats(0, 1), st.integers(0, 99))
    def test_between_equal_norms_norm_stays_and_angle_is_divided(self, lam, seed):
        start, end = (one / one.norm() for one in (matrix(40, seed=seed), matrix(40, seed=seed + 100)))
        merged, angle = slerp_tensors(start, end, lam), angle_between([(start, end)])
        assert merged.norm().item() == pytest.approx(1, abs=1e-12)
        assert angle_between([(start, merged)]) == pytest.approx(lam * angle, abs=1e-7)  # acos near 1
        torch.testing.assert_close(merged, slerp_tensors(end, start, 1 - lam))

    def test_ends_are_exact_to_the_sign_of_zero(self):
        start, end = torch.tensor([-0.0, 1.0, 3.0]), torch.tensor([2.0, -0.0, 1.0])
        for lam, expected in ((0, start), (1, end), (1.0, end)):
            assert torch.equal(slerp_tensors(start, end, lam).view(torch.int32), expected.view(torch.int32))

    @pytest.mark.parametrize("angle", [0.0, 0.9e-4, pi - 0.9e-4, pi])
    def test_nearly_parallel_tensors_take_the_line(self, angle):
        start = torch.tensor([1.0, 0.0], dtype=torch.float64)
        end = 3 * torch.tensor([angle, pi / 2 - angle], dtype=torch.float64).cos()
        assert angle_between([(start, end)]) == pytest.approx(angle, abs=1e-7)
        assert torch.equal(slerp_tensors(start, end, 0.3), interpolate_tensors(start, end, 0.3))

    @pytest.mark.parametrize("angle", [1.1e-4, pi - 1.1e-4])
    def test_and_others_do_not(self, angle):
        start = torch.tensor([1.0, 0.0], dtype=torch.float64)
        end = torch.tensor([angle, pi / 2 - angle], dtype=torch.float64).cos()
        expected = torch.tensor([0.3 * angle, pi / 2 - 0.3 * angle], dtype=torch.float64).cos()
        torch.testing.assert_close(slerp_tensors(start, end, 0.3), expected, rtol=1e-6, atol=1e-6)

    def test_a_zero_tensor_takes_the_line(self):
        end = matrix(5)
        assert angle_between([(torch.zeros(5), end)]) == angle_between([]) == 0
        assert torch.equal(slerp_tensors(torch.zeros_like(end), end, 0.25), 0.25 * end)

    def test_in_parts_it_is_the_same(self):
        start, end = matrix(30, seed=1), matrix(30, seed=2)
        parts = list(zip(start.split(7), end.split(7), strict=True))
        angle = angle_between(parts)
        assert angle == pytest.approx(angle_between([(start, end)]), abs=1e-12)
        merged = torch.cat([slerp_tensors(*part, 0.4, angle) for part in parts])
        torch.testing.assert_close(merged, slerp_tensors(start, end, 0.4))

    def test_angles_are_reported(self, tmp_path):
        start, end = ({"a.weight": matrix(9, 7, seed=seed).float()} for seed in (1, 2))
        models = {"start": write(tmp_path / "start", start), "end": write(tmp_path / "end", end)}
        (row,) = merge_models("slerp", models, tmp_path / "out").tensors
        cosine = torch.cosine_similarity(start["a.weight"].view(-1), end["a.weight"].view(-1), dim=0)
        assert row.measured["angle"] == pytest.approx(cosine.arccos().item(), rel=1e-5)
        assert row.measured["difference"] == pytest.approx(
            (start["a.weight"] - end["a.weight"]).norm().item(), rel=1e-5
        )

    @pytest.mark.parametrize("lam", [-0.1, 1.1])
    def test_it_does_not_extrapolate(self, lam):
        with pytest.raises(ValueError, match=rf"lambda is {lam}, which is outside \[0, 1\]\. Write a value in it"):
            Slerp(lam=lam)


class TestTies:
    BASE = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    TUNED = (torch.tensor([1.5, 0.2, 1.1, 1.0, 1.3]), torch.tensor([1.3, 1.4, 0.9, 1.0, 0.8]))

    def test_worked_example(self):
        # Deltas (.5, -.8, .1, 0, .3) and (.3, .4, -.1, 0, -.2); of each the three largest stay.
        # Elected: +, -, none, none, +; means .4, -.8, 0, 0, .3.
        merged = ties_tensors(self.BASE, self.TUNED, 0.6, 1.0)
        torch.testing.assert_close(merged, torch.tensor([1.4, 0.2, 1.0, 1.0, 1.3]))
        half = ties_tensors(self.BASE, self.TUNED, 0.6, 0.5)
        torch.testing.assert_close(half, (merged + self.BASE) / 2)

    def test_a_tie_of_signs_is_positive(self):
        deltas = torch.tensor([0.5, -0.25]), torch.tensor([-0.5, -0.75])
        assert disjoint_mean(deltas).tolist() == [0.5, -0.5]
        assert disjoint_mean([torch.zeros(2), torch.zeros(2)]).tolist() == [0, 0]

    @given(
        st.integers(0, 60), st.floats(0.01, 1), st.sampled_from([torch.bfloat16, torch.float32]), st.integers(1, 64)
    )
    def test_trimming_keeps_the_largest(self, seed, density, dtype, size):
        """Of equal magnitudes, frequent in bfloat16, the first."""
        delta = (matrix(size, seed=seed) / 8).to(dtype).float()
        if seed % 3 == 0:
            delta = delta.round(decimals=1)
        count = kept_count(density, size)
        found, pieces = torch.zeros(size), delta.split(5)
        trim = Trim(lambda: iter(pieces), count)
        found = torch.cat([trim(piece) for piece in pieces])
        order = torch.argsort(delta.abs(), descending=True, stable=True)[:count]
        expected = torch.zeros(size).index_copy(0, order, delta[order])
        assert torch.equal(found, expected)

    def test_counts_of_what_is_kept(self):
        assert [kept_count(density, 10) for density in (0.01, 0.1, 0.29, 0.7, 1.0)] == [1, 1, 2, 7, 10]

    def test_one_model_at_full_density_is_task_arithmetic(self):
        base, tuned = matrix(6, 5, seed=1), matrix(6, 5, seed=2)
        torch.testing.assert_close(ties_tensors(base, [tuned], 1.0, 1.0), tuned)
        torch.testing.assert_close(ties_tensors(base, [tuned, tuned], 1.0, 0.5), (base + tuned) / 2)

    def test_the_order_of_the_models_does_not_matter(self):
        base, *tuned = (matrix(8, 9, seed=seed) for seed in range(4))
        torch.testing.assert_close(ties_tensors(base, tuned, 0.4, 1.0), ties_tensors(base, tuned[::-1], 0.4, 1.0))

    def test_the_share_that_agrees_is_reported(self, tmp_path):
        # In the worked example six values are kept, and .4 and -.2 are against the elected sign.
        models = {"base": write(tmp_path / "base", {"a.weight": self.BASE, "b.weight": self.BASE.clone()})}
        tuned = [{"a.weight": one, "b.weight": self.BASE.clone()} for one in self.TUNED]
        models["tuned"] = [write(tmp_path / f"tuned{i}", one) for i, one in enumerate(tuned)]
        rows = merge_models("ties", models, tmp_path / "out", density=0.6).tensors
        kept = [torch.tensor([0.5, -0.8, 0, 0, 0.3]), torch.tensor([0.3, 0.4, 0, 0, -0.2])]
        elected = sum(kept).sign()
        share = sum((one.sign() * elected > 0).sum() for one in kept) / sum(one.count_nonzero() for one in kept)
        assert [row.measured["agreeing"] for row in rows] == [pytest.approx(share.item()), 1.0]
        assert share == pytest.approx(4 / 6)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"density": 0.0}, r"`density` must be in \(0, 1\]; got 0.0"),
            ({"density": 20}, r"`density` must be in \(0, 1\]; got 20"),
            ({"lam": -1}, r"lambda is -1, which is outside \[0, inf\)"),
            ({"lam": [0.5, 0.5]}, "several different ones"),
        ],
    )
    def test_flags(self, flags, message):
        with pytest.raises(ValueError, match=message):
            Ties(**flags)
