"""Report of merging, tensor by tensor."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from hf_rb.weights.patterns import LAYER


__all__ = ["MergeReport", "TensorReport", "root"]


@dataclass
class TensorReport:
    """
    One tensor of the result, or one expert's matrix of it.

    Attributes:
        name (`str`): Name in the files; of fused experts with the number of the expert, `….gate_up_proj[3]`.
        weights (`int`): Its weights.
        kept (`str`, *optional*): Why it is that of the receiving model as it was; `None` if it was merged.
        measured (`dict`): Frobenius norms and the like, named in [`MergeReport`].
    """

    name: str
    weights: int
    kept: str | None = None
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass
class MergeReport:
    """
    Report of merging. `dataclasses.asdict` makes it JSON-able; it is `merge.json` in the folder of the result.

    Every merged tensor has, as Frobenius norms, `norm` of the receiving model's tensor, `difference` of the two models
    that are compared (the two ends; Base and Instruct), and `change` from the receiving model's tensor to the result,
    in a sweep a list with one value for each lambda; and `sigma`, the sum of |A - B| over that of |A| + |B| for the
    same two models, with the denominator as `absolute`. Where a delta is applied, there are `wanted`, its norm, and
    `error`, the norm of what was applied minus what was wanted. A method adds the metrics of its record.

    Attributes:
        method (`str`): Key of the method in `hf_rb.hub.METHODS`.
        models (`dict[str, str]`): The models by their role.
        files_from (`str`): Role of the model that configuration, tokenizer, template and generation config are from.
        options (`dict`): What was asked for.
        tensors (`list[TensorReport]`): In the order in which they were written.
        dropped (`list[str]`): Tensors of the other models for which the receiving one has no place.
        notes (`list[str]`): What a user should know.
        seconds (`float`): Time of this call, not of the calls that it goes on from.
        file_bytes (`int`): Bytes of the weight files of one result.
    """

    method: str
    models: dict[str, str]
    files_from: str
    options: dict[str, Any] = field(default_factory=dict)
    tensors: list[TensorReport] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    file_bytes: int = 0

    @property
    def merged(self) -> list[TensorReport]:
        return [tensor for tensor in self.tensors if tensor.kept is None]

    def norm(self, key: str, index: int | None = None) -> float:
        """Frobenius norm over all merged tensors together; `index` is the place in a sweep."""
        return root(self.merged, key, index)

    def sigma(self) -> tuple[float, float] | None:
        """
        Similarity of the two compared models: as Shadow-FT's code has it, the mean over tensors of layers that are no
        norms and no biases, each with the same weight; and the ratio of the sums over all of these. 0 is equal, 1 the
        farthest.
        """
        compared = [t for t in self.merged if "sigma" in t.measured]
        chosen = [t for t in compared if LAYER.search(t.name) and "bias" not in t.name and "norm" not in t.name]
        return mean_and_ratio((t.measured["sigma"], t.measured["absolute"]) for t in chosen) if chosen else None


def root(tensors: Iterable[TensorReport], key: str, index: int | None = None) -> float:
    """Frobenius norm over several tensors together; of a sweep, at its last lambda unless `index` says another."""
    values = (tensor.measured[key] for tensor in tensors)
    chosen = (value[-1 if index is None else index] if isinstance(value, list) else value for value in values)
    return sqrt(sum(value**2 for value in chosen))


def mean_and_ratio(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Mean of ratios, and ratio of sums, from the ratios and their denominators."""
    pairs = list(pairs)
    total = sum(absolute for _, absolute in pairs)
    ratio = sum(sigma * absolute for sigma, absolute in pairs) / total if total else 0.0
    return sum(sigma for sigma, _ in pairs) / len(pairs), ratio
