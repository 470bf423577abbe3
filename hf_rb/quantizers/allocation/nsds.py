r"""NSDS: which decoder layers deserve more bits, told from their weights alone
(https://huggingface.co/papers/2603.17354).

A layer has modules that read the hidden state, the *detectors* W_up, W_gate and the circuit W_QK = W_Q' W_K of every
head, and modules that write to it, the *writers* W_down and the circuit W_OV = W_O W_V of every head. Each has two
numbers:

- numerical vulnerability: the excess kurtosis of its entries;
- structural expressiveness: with M = sum_i s_i u_i v_i', as many terms as hold 99 % of sum s_i^2, and s'_i = s_i b_i,

      SE = sum_i s'_i / exp(H),    H = -sum_i p_i ln p_i,    p_i = s'_i / sum s'

  where b_i says what a direction is good for: ln(1 + kurtosis(v_i)) for up and gate, ln(1 + kurtosis(u_i)
  kurtosis(v_i)) for a QK circuit (negative kurtosis counts as 0), and for writers the part of u_i that the unembedding
  sees, |P'u_i| with P its right singular vectors that hold 99 %.

Numbers of heads are averaged. Those of a module are compared across layers, z = (x - median) / median |x - median|,
and squashed, s = 1 / (1 + exp(-z)); a soft OR, 1 - exp(mean ln(1 - s)), joins modules, and then the two kinds.

This follows the formulas, not the released code where that contradicts them: there the *least* sensitive layers come
out on top, the head size is taken from the hidden size, and the writers' b_i runs over the wrong axis. Circuits, of
rank at most the head size, are decomposed as that (two QR factorizations and a small SVD), which changes nothing and
is cheap.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor


__all__ = [
    "LayerScore",
    "LayerWeights",
    "allocate",
    "combine",
    "excess_kurtosis",
    "expressiveness",
    "layer_numbers",
    "output_directions",
    "soft_or",
    "squash",
]

ENERGY, FEWEST = 0.99, 2
TINY = 1e-12
CHUNK = 1 << 20  # entries of a product that are looked at together


class LayerWeights(NamedTuple):
    """
    The weights of a decoder layer, as `nn.Linear` has them.

    Attributes:
        query, key, value (`torch.Tensor`): `(heads * head_dim, hidden)`; keys and values may have fewer heads.
        output (`torch.Tensor`): `(hidden, heads * head_dim)`.
        gate, up (`torch.Tensor`): `(intermediate, hidden)`; there may be no gate.
        down (`torch.Tensor`): `(hidden, intermediate)`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    gate: Tensor | None
    up: Tensor
    down: Tensor


class LayerScore(NamedTuple):
    """
    Sensitivity of a layer, in (0, 1).

    Attributes:
        numerical (`float`): By its modules' kurtosis.
        structural (`float`): By their expressiveness.
        score (`float`): By both.
    """

    numerical: float
    structural: float
    score: float


def layer_numbers(
    weights: LayerWeights, head_dim: int, directions: Tensor, rank: str = "divide"
) -> tuple[dict[str, float], dict[str, float]]:
    """
    Returns the numerical vulnerability and the structural expressiveness of the modules of a layer.

    Args:
        weights ([`LayerWeights`]):
            Its weights, any floating type.
        head_dim (`int`):
            Width of a head.
        directions (`torch.Tensor`):
            What the unembedding sees, `(hidden, n)`, from [`output_directions`].
        rank (`str`, *optional*, defaults to `"divide"`):
            `"divide"` by the effective rank exp(H), as the released code does, or `"multiply"` by it.

    Returns:
        `tuple[dict[str, float], dict[str, float]]`: By `"up"`, `"gate"`, `"qk"`, `"down"`, `"ov"`.
    """
    query, key, value, output = map(_wide, (weights.query, weights.key, weights.value, weights.output))
    gate, up, down = None if weights.gate is None else _wide(weights.gate), _wide(weights.up), _wide(weights.down)
    numerical, structural = {}, {}
    for name, matrix in (("up", up), ("gate", gate)):
        if matrix is not None:
            numerical[name] = excess_kurtosis([matrix])
            values, left = _kept(*_gram_spectrum(matrix.T))
            structural[name] = expressiveness(values, _peaked(left).log1p(), rank)
    numerical["down"] = excess_kurtosis([down])
    values, left = _kept(*_gram_spectrum(down))
    structural["down"] = expressiveness(values, _seen(left, directions), rank)
    heads = len(query) // head_dim
    shared = heads // (len(key) // head_dim)
    circuits: dict[str, list[tuple[Tensor, Tensor]]] = {"qk": [], "ov": []}
    for head in range(heads):
        here, other = (slice(i * head_dim, (i + 1) * head_dim) for i in (head, head // shared))
        circuits["qk"].append((query[here], key[other]))
        circuits["ov"].append((output[:, here].T, value[other]))
    for name, pairs in circuits.items():
        numbers = [_circuit_numbers(*pair, None if name == "qk" else directions, rank) for pair in pairs]
        numerical[name], structural[name] = (sum(column) / heads for column in zip(*numbers, strict=True))
    return numerical, structural


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _circuit_numbers(left: Tensor, right: Tensor, directions: Tensor | None, rank: str) -> tuple[float, float]:
    """The numbers of `left.T @ right`, both `(head_dim, hidden)`: a QK circuit, or a writer where there are
    directions.
    """
    rows = max(1, CHUNK // right.shape[1])
    kurtosis = excess_kurtosis(block.T @ right for block in left.split(rows, dim=1))
    values, outputs, inputs = _kept(*_circuit_spectrum(left.double(), right.double()))
    weights = (_peaked(outputs) * _peaked(inputs)).log1p() if directions is None else _seen(outputs, directions)
    return kurtosis, expressiveness(values, weights, rank)


def excess_kurtosis(parts: Iterable[Tensor]) -> float:
    """Returns `m4 / m2^2 - 3` of the entries of a matrix given in parts, summed in float64; 0 for equal entries."""
    count, sums = 0, torch.zeros(4, dtype=torch.float64)
    for part in parts:
        for piece in part.reshape(-1).split(CHUNK):
            piece = piece.double()
            square = piece.square()
            count += len(piece)
            powers = (piece, square, square * piece, square.square())
            sums += torch.stack([power.sum() for power in powers]).cpu()
    mean, second, third, fourth = (sums / count).tolist()
    variance = second - mean**2
    if variance <= TINY * second:
        return 0.0
    return (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2 - 3


def expressiveness(values: Tensor, weights: Tensor, rank: str = "divide") -> float:
    """Returns SE of singular values `(n,)` and what their directions are good for, `(n,)`; 0 if that is nothing."""
    weighted = values * weights
    total = weighted.sum()
    if not total > 0:
        return 0.0
    entropy = torch.special.entr(weighted / total).sum()
    return (total * (entropy if rank == "multiply" else -entropy).exp()).item()


def output_directions(unembedding: Tensor) -> Tensor:
    """Returns the right singular vectors that hold 99 % of an unembedding `(vocabulary, hidden)`, float64
    `(hidden, n)`.
    """
    return _kept(*_gram_spectrum(unembedding.T))[1]


def _gram_spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns singular values, largest first, and left singular vectors in columns, from M M'."""
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for part in matrix.split(max(1, CHUNK // len(matrix)), dim=1):
        part = _wide(part)
        gram += part @ part.T
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_(min=0).sqrt_().flip(0), vectors.flip(1)


def _circuit_spectrum(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns singular values of `left.T @ right`, and left and right vectors in columns, without the matrix."""
    (left, left_factor), (right, right_factor) = torch.linalg.qr(left.T), torch.linalg.qr(right.T)
    inner_left, values, inner_right = torch.linalg.svd(left_factor @ right_factor.T)
    return values, left @ inner_left, right @ inner_right.T


def _kept(values: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Returns the largest singular values that hold nearly all of the energy, with their vectors."""
    energy = values.square().cumsum(0)
    count = max(FEWEST, int((energy < ENERGY * energy[-1]).sum()) + 1)
    return values[:count], *(one[:, :count] for one in vectors)


def _peaked(vectors: Tensor) -> Tensor:
    """Excess kurtosis of every column, at least 0."""
    moved = vectors - vectors.mean(0)
    variance = moved.square().mean(0).clamp_(min=torch.finfo(vectors.dtype).tiny)
    return (moved.pow(4).mean(0) / variance.square() - 3).clamp_(min=0)


def _seen(vectors: Tensor, directions: Tensor) -> Tensor:
    return (directions.T @ vectors.to(directions)).norm(dim=0).to(vectors)


def squash(values: Sequence[float]) -> list[float]:
    """Compares a number of a module across layers: robust z-scores, then the logistic function."""
    moved = [value - median(values) for value in values]
    scale = median(map(abs, moved)) + TINY
    return [(1 + math.tanh(value / scale / 2)) / 2 for value in moved]  # the logistic function, without its overflow


def soft_or(values: Sequence[float]) -> float:
    """Returns `1 - exp(mean ln(1 - s))`."""
    return 1 - math.exp(sum(math.log(1 - value + TINY) for value in values) / len(values))


def combine(numerical: Sequence[dict[str, float]], structural: Sequence[dict[str, float]]) -> list[LayerScore]:
    """Returns the scores of all layers, from what [`layer_numbers`] says of each."""
    joined = []
    for layers in (numerical, structural):
        columns = [squash([layer[module] for layer in layers]) for module in layers[0]]
        joined.append([soft_or(row) for row in zip(*columns, strict=True)])
    return [LayerScore(*pair, score=soft_or(pair)) for pair in zip(joined[0], joined[1], strict=True)]


def allocate(scores: Sequence[float], budget: float, low: int, high: int) -> list[int]:
    """
    Gives the most sensitive layers `high` and the others `low`.

    Args:
        scores (`Sequence[float]`):
            A score for each layer; of equal ones the first comes first.
        budget (`float`):
            What the layers have on average, from `low` to `high`, to the nearest whole layer.
        low, high (`int`):
            Bits, or planes.

    Raises:
        ValueError: The budget lies outside.
    """
    if not low <= budget <= high:
        raise ValueError(f"The budget of NSDS lies between {low} and {high}; got {budget}.")
    count = round(len(scores) * (budget - low) / (high - low))
    chosen = sorted(range(len(scores)), key=lambda layer: -scores[layer])[:count]
    return [high if layer in chosen else low for layer in range(len(scores))]
