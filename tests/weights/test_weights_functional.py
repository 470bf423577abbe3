"""The pure functions of interpolation, Shadow-FT and Timber: worked numbers and invariants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rb.weights import effective_rank, graft_tensors, interpolate_tensors, refine_tensors, sigma
from hf_rb.weights.report import mean_and_ratio
from hf_rb.weights.timber import Spectrum, kept_rank, singular_values


def matrix(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_spectrum(values, rows=6, columns=9, seed=0):
    """A matrix with these singular values."""
    left = torch.linalg.qr(matrix(rows, rows, seed=seed))[0]
    right = torch.linalg.qr(matrix(columns, columns, seed=seed + 1))[0]
    return left[:, : len(values)] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[:, : len(values)].T


class TestInterpolation:
    START, END = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 2.0, 0.5])

    @pytest.mark.parametrize(
        ("lam", "expected"), [(0.2, [1.4, -1.2, 0.5]), (0.55, [2.1, 0.2, 0.5]), (0.8, [2.6, 1.2, 0.5])]
    )
    def test_worked_example(self, lam, expected):
        torch.testing.assert_close(interpolate_tensors(self.START, self.END, lam), torch.tensor(expected))

    def test_task_arithmetic_with_any_base(self):
        base = torch.tensor([0.5, -1.0, 0.0])
        merged = base + 0.8 * (self.END - base) + 0.2 * (self.START - base)
        torch.testing.assert_close(interpolate_tensors(self.START, self.END, 0.8), merged)

    @pytest.mark.parametrize(
        ("lam", "expected"), [(0.5, [1, 0.3046875, -2.65625]), (0.8, [1.0078125, 0.30859375, -2.609375])]
    )
    def test_bfloat16_is_rounded_once(self, lam, expected):
        start = torch.tensor([1, 0.30078125, -2.703125], dtype=torch.bfloat16)
        end = torch.tensor([1.0078125, 0.310546875, -2.59375], dtype=torch.bfloat16)
        merged = interpolate_tensors(start.float(), end.float(), lam).bfloat16()
        assert merged.tolist() == expected

    def test_ends_and_equal_values_are_exact_to_the_sign_of_zero(self):
        start, end = torch.tensor([-0.0, 0.1, -0.0, 1.5]), torch.tensor([0.7, 0.3, -0.0, 1.5])
        for lam, expected in ((0, start), (1, end), (1.0, end)):
            assert torch.equal(interpolate_tensors(start, end, lam).view(torch.int32), expected.view(torch.int32))
        for lam in (0.1, 0.37, 0.9):
            merged = interpolate_tensors(start, end, lam)
            assert torch.equal(merged[2:].view(torch.int32), start[2:].view(torch.int32))

    @given(st.floats(0, 1), st.integers(0, 99))
    def test_swapping_the_ends_is_one_minus_lambda(self, lam, seed):
        start, end = matrix(5, seed=seed), matrix(5, seed=seed + 1)
        torch.testing.assert_close(interpolate_tensors(start, end, lam), interpolate_tensors(end, start, 1 - lam))

    def test_interpolation_is_affine(self):
        start, end = matrix(4, 5, seed=1), matrix(4, 5, seed=2)
        torch.testing.assert_close(interpolate_tensors(start, end, 0.5), (start + end) / 2)
        quarter, half = (interpolate_tensors(start, end, lam) for lam in (0.25, 0.5))
        torch.testing.assert_close(interpolate_tensors(start, half, 0.5), quarter)
        torch.testing.assert_close(interpolate_tensors(start, end, 1.5), end + (end - start) / 2)


class TestGraft:
    BASE, INSTRUCT = torch.tensor([[0.5, -0.25], [1, 2]]), torch.tensor([[0.52, -0.2], [0.9, 2.1]])
    DELTA = 2 * torch.tensor([[1.0], [2.0]]) @ torch.tensor([[0.1, -0.2]])  # alpha / r = 2

    def test_worked_example(self):
        torch.testing.assert_close(self.DELTA, torch.tensor([[0.2, -0.4], [0.4, -0.8]]))
        tuned = self.BASE + self.DELTA
        torch.testing.assert_close(tuned, torch.tensor([[0.7, -0.65], [1.4, 1.2]]))
        grafted = graft_tensors(self.BASE, tuned, self.INSTRUCT)
        torch.testing.assert_close(grafted, torch.tensor([[0.72, -0.6], [1.3, 1.3]]))
        assert sigma(self.BASE, self.INSTRUCT) == pytest.approx(0.03614457, abs=5e-9)

    def test_mean_of_sigmas_is_not_the_ratio_of_the_sums(self):
        pairs = [(self.BASE, self.INSTRUCT), (torch.tensor([10.0, 10.0]), torch.tensor([10.0, 10.1]))]
        sigmas = [(sigma(*pair), sum(one.abs().sum().item() for one in pair)) for pair in pairs]
        assert sigmas[1][0] == pytest.approx(0.00249378, abs=5e-9)
        assert mean_and_ratio(sigmas) == pytest.approx((0.01931917, 0.00777802), abs=5e-9)
        assert sigma(torch.zeros(3), torch.zeros(3)) == 0

    def test_without_training_nothing_changes(self):
        onto = torch.tensor([-0.0, 0.1, 3.0])
        assert torch.equal(graft_tensors(onto * 7, onto * 7, onto).view(torch.int32), onto.view(torch.int32))

    def test_onto_base_it_is_the_tuned_base(self):
        base, tuned = matrix(4, 4, seed=1), matrix(4, 4, seed=2)
        torch.testing.assert_close(graft_tensors(base, tuned, base), tuned)

    def test_grafts_add_and_are_task_arithmetic(self):
        base, onto, one, two = (matrix(4, 4, seed=seed) for seed in range(4))
        after_both = graft_tensors(base, base + two, graft_tensors(base, base + one, onto))
        torch.testing.assert_close(after_both, graft_tensors(base, base + one + two, onto))
        torch.testing.assert_close(graft_tensors(base, one, onto), base + (one - base) + (onto - base))


class TestTimber:
    @pytest.mark.parametrize(
        ("values", "erank", "k"),
        [
            ([3.0, 1.0], 1.75476535, 2),
            ([3.0, 2.0, 1.0], 2.74945927, 3),
            ([10.0, 1.5, 1.0, 0.5], 2.16756654, 3),
            ([8.0, 1.0, 0.5, 0.25, 0.2], 2.07025813, 3),
            ([3.0, 2.0, 1.0, 0.5, 0.1], 3.54328630, 4),
        ],
    )
    def test_worked_examples(self, values, erank, k):
        assert effective_rank(torch.tensor(values)) == pytest.approx(erank, abs=5e-9)
        assert kept_rank(erank, len(values)) == k
        base, difference = matrix(5, 7, seed=5), of_spectrum(values, 5, 7)
        # The ranks of the matrix are those of its values: what is behind them is zero, not noise.
        (refined,), found = refine_tensors(base, base + difference, [0.2])
        assert (found.k, found.erank) == (k, pytest.approx(erank, abs=1e-7))
        expected = values[:k] + [0.2 * value for value in values[k:]]
        torch.testing.assert_close(
            torch.linalg.svdvals(refined - base)[: len(values)], torch.tensor(expected, dtype=torch.float64)
        )

    @pytest.mark.parametrize("n", [1, 2, 6, 37, 150])
    @pytest.mark.parametrize("scale", [1e-5, 1.0, 3e4])
    def test_flat_spectra_have_their_number(self, n, scale):
        erank = effective_rank(torch.full((n,), scale))
        assert erank == pytest.approx(n) and kept_rank(erank, n) == n
        found = refine_tensors(torch.zeros(160, 200), of_spectrum([scale] * n, 160, 200), [0.5])[1]
        assert found.k == n

    @given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.floats(1e-3, 1e3))
    def test_bounds_and_invariances(self, values, scale):
        values = sorted(values, reverse=True)
        erank = effective_rank(torch.tensor(values, dtype=torch.float64))
        assert 1 - 1e-9 <= erank <= len(values) + 1e-9
        assert effective_rank(scale * torch.tensor(values, dtype=torch.float64)) == pytest.approx(erank)

    def test_transposed_rotated_and_scaled_matrices(self):
        one = matrix(6, 4, seed=3)
        rotation = torch.linalg.qr(matrix(6, 6, seed=4))[0]
        eranks = [effective_rank(singular_values(m)) for m in (one, one.T, 7 * one, rotation @ one)]
        assert eranks == pytest.approx([effective_rank(torch.linalg.svdvals(one))] * 4, abs=1e-10)

    def test_gram_form_is_the_svd_form(self):
        for shape in ((12, 20), (20, 12)):
            base, model = matrix(*shape, seed=1), matrix(*shape, seed=2)
            (refined,), found = refine_tensors(base, model, [0.3])
            u, values, v = torch.linalg.svd(model - base, full_matrices=False)
            spectrum = Spectrum.of(values)
            values[spectrum.k :] *= 0.3
            torch.testing.assert_close(refined, base + u @ torch.diag(values) @ v, atol=1e-13, rtol=1e-13)
            assert found.k == spectrum.k and found.energy == pytest.approx(spectrum.energy)

    def test_lambda(self):
        base, model = matrix(10, 16, seed=1), matrix(10, 16, seed=1) + of_spectrum([9, 3, 1, 0.3, 0.1, 0.01], 10, 16)
        (cut, half, same), found = refine_tensors(base, model, [0, 0.5, 1])
        assert torch.equal(same, model)
        assert (torch.linalg.svdvals(cut - base) > 1e-9).sum() == found.k < 6
        torch.testing.assert_close(half, (cut + same) / 2)  # affine in lambda
        assert (model - half).norm().item() == pytest.approx(0.5 * found.tail)
        assert found.tail == pytest.approx(torch.linalg.svdvals(model - base)[found.k :].norm().item())

    def test_nothing_to_refine(self):
        model = matrix(3, 3)
        (refined,), found = refine_tensors(model, model, [0.0])
        assert torch.equal(refined, model) and (found.erank, found.k, found.energy) == (0.0, 0, 1.0)
        (refined,), found = refine_tensors(torch.zeros(2, 2), torch.diag(torch.tensor([3.0, 1.0])), [0.0])
        assert torch.equal(refined, torch.diag(torch.tensor([3.0, 1.0]).double())) and found.k == 2

    def test_a_bfloat16_difference_is_nearly_of_full_rank(self):
        found = refine_tensors(torch.zeros(64, 96), matrix(64, 96, dtype=torch.float32), [0.2])[1]
        assert 55 < found.erank < 60 and found.rank == 64
