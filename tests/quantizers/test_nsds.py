import math
from functools import partial

import pytest
import torch
from helpers import tensors

from hf_rb.quantizers.allocation.nsds import (
    LayerWeights,
    _circuit_spectrum,
    _gram_spectrum,
    _kept,
    allocate,
    combine,
    excess_kurtosis,
    expressiveness,
    layer_numbers,
    output_directions,
    soft_or,
    squash,
)


gaussian = partial(tensors.gaussian, dtype=torch.float64)
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 24, 40, 4, 10  # a head size that is not hidden / heads


def layer(seed, scale=1.0, gated=True):
    def matrix(rows, columns, number):
        return scale * gaussian(rows, columns, seed=100 * seed + number) ** (1 + 2 * (number % 2))

    width, narrow = HEADS * HEAD_DIM, 2 * HEAD_DIM
    attention = (
        matrix(width, HIDDEN, 0),
        matrix(narrow, HIDDEN, 1),
        matrix(narrow, HIDDEN, 2),
        matrix(HIDDEN, width, 3),
    )
    gate = matrix(INTERMEDIATE, HIDDEN, 4) if gated else None
    return LayerWeights(*attention, gate, matrix(INTERMEDIATE, HIDDEN, 5), matrix(HIDDEN, INTERMEDIATE, 6))


@pytest.fixture(scope="module")
def directions():
    return output_directions(gaussian(64, HIDDEN, seed=7) * torch.linspace(0.01, 3, HIDDEN))


def scores(layers, directions, **options):
    numbers = [layer_numbers(one, HEAD_DIM, directions, **options) for one in layers]
    return combine(*zip(*numbers, strict=True))


# The worked example.


def test_worked_example():
    numerical, structural = squash([0.1, 0.2, 0.15, 1.4]), squash([5, 4, 9, 5.5])
    assert numerical == pytest.approx([0.182426, 0.622459, 0.377541, 1.0], abs=1e-6)
    assert structural == pytest.approx([0.41743, 0.158869, 0.993307, 0.58257], abs=1e-6)
    both = [soft_or(pair) for pair in zip(numerical, structural, strict=True)]
    assert both == pytest.approx([0.309859, 0.436474, 0.935455, 0.999997], abs=1e-6)
    assert allocate(both, 3.0, 2, 4) == [2, 2, 4, 4]


# Its parts.


def test_kurtosis_of_parts():
    matrix = gaussian(50, 30) ** 3 + 1
    moved = matrix - matrix.mean()
    expected = (moved.pow(4).mean() / moved.square().mean() ** 2 - 3).item()
    assert excess_kurtosis([matrix[:20], matrix[20:]]) == pytest.approx(expected, rel=1e-10)
    assert abs(excess_kurtosis([gaussian(1000, 1000)])) < 0.02
    assert excess_kurtosis([torch.full((3, 3), 0.1)]) == excess_kurtosis([torch.zeros(3, 3)]) == 0


def test_circuit_is_its_dense_matrix():
    left, right = gaussian(HEAD_DIM, HIDDEN), gaussian(HEAD_DIM, HIDDEN, seed=1)
    values, outputs, inputs = _circuit_spectrum(left, right)
    dense = left.T @ right
    torch.testing.assert_close(outputs * values @ inputs.T, dense, rtol=0, atol=1e-10)
    expected = torch.linalg.svdvals(dense)[:HEAD_DIM]
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)


def test_spectrum_from_the_gram_matrix():
    matrix = gaussian(HIDDEN, INTERMEDIATE)
    left, values, _ = torch.linalg.svd(matrix)
    found, vectors = _gram_spectrum(matrix)
    torch.testing.assert_close(found, values)
    torch.testing.assert_close((vectors * left).sum(0).abs(), torch.ones(HIDDEN).double())


def test_energy_that_is_kept():
    spectrum = _gram_spectrum(torch.diag(torch.tensor([10.0, 1.0, 0.9, 0.1])))
    assert _kept(*spectrum)[0].tolist() == pytest.approx([10, 1])  # 101 / 101.82 is more than 0.99
    assert len(_kept(*_gram_spectrum(torch.diag(torch.tensor([10.0, 0.0, 0.0]))))[0]) == 2


def test_expressiveness():
    values = torch.tensor([3.0, 1.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert expressiveness(values, torch.ones(2)) == pytest.approx(4 / math.exp(entropy))
    assert expressiveness(values, torch.ones(2), "multiply") == pytest.approx(4 * math.exp(entropy))
    assert expressiveness(values, torch.zeros(2)) == 0


def test_numbers_of_a_layer_from_dense_matrices(directions):
    weights = layer(3)
    numerical, structural = layer_numbers(weights, HEAD_DIM, directions)
    kurtosis, expressive = [], []
    for head in range(HEADS):
        here, other = (slice(i * HEAD_DIM, (i + 1) * HEAD_DIM) for i in (head, head // 2))
        written = weights.output[:, here] @ weights.value[other]
        kurtosis.append(excess_kurtosis([written]))
        left, values, _ = torch.linalg.svd(written)
        energy = values.square().cumsum(0)
        count = max(2, int((energy < 0.99 * energy[-1]).sum()) + 1)
        seen = (left[:, :count].T @ directions).norm(dim=1)
        expressive.append(expressiveness(values[:count], seen))
    assert numerical["ov"] == pytest.approx(sum(kurtosis) / HEADS)
    assert structural["ov"] == pytest.approx(sum(expressive) / HEADS)
    left, values, _ = torch.linalg.svd(weights.down)  # one number for every direction that is written
    seen = (left.T @ directions).norm(dim=1)
    energy = values.square().cumsum(0)
    count = max(2, int((energy < 0.99 * energy[-1]).sum()) + 1)
    assert count < HIDDEN and structural["down"] == pytest.approx(expressiveness(values[:count], seen[:count]))
    assert set(numerical) == set(structural) == {"up", "gate", "qk", "down", "ov"}
    assert "gate" not in layer_numbers(layer(3, gated=False), HEAD_DIM, directions)[0]


# Invariants.


def test_scores(directions):
    layers = [layer(seed) for seed in range(5)]
    found = scores(layers, directions)
    assert all(0 < number < 1 for score in found for number in score)
    order = [3, 0, 4, 1, 2]
    permuted = scores([layers[i] for i in order], directions)
    for place, i in enumerate(order):
        assert permuted[place] == pytest.approx(found[i], rel=1e-9)
    scaled = scores([layer(seed, scale=7.0) for seed in range(5)], directions)
    for one, other in zip(found, scaled, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert scores(layers, directions, rank="multiply") != found


def test_equal_layers_have_half(directions):
    for score in scores([layer(1)] * 3, directions):
        assert score == pytest.approx((0.5, 0.5, 0.5), abs=1e-9)


@pytest.mark.parametrize("budget", [2.0, 2.3, 3.0, 3.51, 4.0])
def test_allocation_keeps_the_budget(budget):
    values = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    bits = allocate(values, budget, 2, 4)
    assert sum(bits) / 30 == pytest.approx(budget, abs=1 / 30)
    assert min([v for v, b in zip(values, bits, strict=True) if b == 4], default=1) >= max(
        [v for v, b in zip(values, bits, strict=True) if b == 2], default=0
    )


def test_equal_scores_and_bad_budgets():
    assert allocate([0.5, 0.5, 0.5, 0.5], 2.5, 2, 3) == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="between 2 and 4; got 4.5"):
        allocate([0.5], 4.5, 2, 4)
