"""
The router doctor: is the load of the experts balanced, do tokens decide clearly, do routers point where their experts
respond?

Of a layer with N experts over some tokens, with c_i the times that expert i was chosen:

    MaxVio     = max_i c_i / mean c - 1                      0 at balance, N / K - 1 where all tokens choose the same K
    dead       = #{i : c_i = 0}
    load entropy, entropy                                    of c / Σ c, and the mean of a token's softmax,
                                                             both in [0, 1] (1 = uniform)
    λ          = ‖G r‖ / (‖r‖ ‖G‖₂)                          see `hf_rb.models.mpi.alignment`

λ is given for the learned router, for the effective one and for one power step on random rows: a power step alone
raises λ, whatever the rows are, so only what the effective router has above the third was learned.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from hf_rb.models.mpi.conversion import RoutedLayer, routers
from hf_rb.models.mpi.functional import alignment, effective_router


__all__ = [
    "Load",
    "RoutedLayerReport",
    "RouterMeter",
    "RouterReport",
    "evenness",
    "examine",
    "layer_alignments",
    "max_vio",
    "mean_entropy",
    "row_cosine",
    "total_picks",
]


def max_vio(picks: Tensor) -> float:
    """Returns how far the most chosen expert is above the mean load, in units of the mean, of counts `(N,)`; NaN
    without tokens.
    """
    picks = picks.double()
    return (picks.max() / picks.mean() - 1).item()


def row_cosine(rows_ND: Tensor) -> float:
    """Returns the mean |cos| between two different rows of a router `(N, D)`: 0 orthogonal, 1 all on one line."""
    rows = torch.nn.functional.normalize(rows_ND.detach().float(), dim=-1)
    cosines = (rows @ rows.T).abs()
    count = len(rows)
    return ((cosines.sum() - cosines.diagonal().sum()) / max(count * (count - 1), 1)).item()


def evenness(picks: Tensor) -> float:
    """Returns the entropy of counts `(N,)` as a share of the largest possible: 1 where all are equal."""
    shares = picks.double() / picks.sum()
    return torch.special.entr(shares).sum().item() / math.log(len(picks))


@torch.no_grad()
def layer_alignments(layer: RoutedLayer, seed: int = 0) -> dict[str, float]:
    """
    Returns the mean λ over the experts of a layer.

    Args:
        layer ([`~hf_rb.models.mpi.conversion.RoutedLayer`]):
            Layer, with MPI or without.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random rows.

    Returns:
        `dict[str, float]`: `learned`, `effective` (the same for an ordinary router) and `random`: random rows after
        one power step.

    Raises:
        TypeError: The experts' matrices are not known, as those of quantized experts.
    """
    learned, expert_NdD = layer.learned.float(), layer.expert_matrix()
    draws = torch.randn(learned.shape, generator=torch.Generator().manual_seed(seed)).to(learned.device)
    stepped = effective_router(draws, expert_NdD, scale=1.0)
    # The norms of the matrices are what costs: they are computed once, in the first of the three.
    random = alignment(stepped, expert_NdD)
    norms = _response(stepped, expert_NdD) / random
    values = {"learned": learned, "effective": layer.weight().float()}
    values = {name: _response(rows, expert_NdD) / norms for name, rows in values.items()}
    return {name: value.mean().item() for name, value in (values | {"random": random}).items()}


def _response(rows_ND: Tensor, expert_NdD: Tensor) -> Tensor:
    pairs = zip(rows_ND, expert_NdD, strict=True)
    return torch.stack([(matrix.float() @ row).norm() / row.norm() for row, matrix in pairs])


@dataclass
class Load:
    """Routing of some tokens in a layer: choices of each expert, and the sum of their entropies, in [0, 1] each."""

    picks: Tensor
    entropy: Tensor
    tokens: Tensor


def total_picks(loads: Sequence[Load]) -> Tensor:
    """Returns how often each expert was chosen in all of several loads of a layer, float64."""
    return reduce(torch.add, (load.picks.double() for load in loads))


def mean_entropy(loads: Sequence[Load]) -> float:
    """Returns the mean entropy of a token's choice over several loads of a layer, in [0, 1]."""
    entropy = reduce(torch.add, (load.entropy for load in loads))
    return (entropy / reduce(torch.add, (load.tokens for load in loads))).item()


class RouterMeter:
    """
    Counts which experts the tokens of forward passes choose. Padding, by the `attention_mask` of the pass, does not
    count.

    Args:
        model (`torch.nn.Module`):
            Mixture of experts of transformers, wrapped or not.
        training (`bool`, *optional*, defaults to `False`):
            Whether only passes with gradients count, and neither evaluation nor generation.

    Raises:
        TypeError: The model has no mixture of experts.
    """

    def __init__(self, model: Any, training: bool = False):
        self.layers, self.training = list(routers(model)), training
        if not self.layers:
            raise TypeError(f"{type(model).__name__} has no mixture of experts: this model has no routers.")
        self._mask: Tensor | None = None
        self._counting = True
        self._reset()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._handles = [getattr(base, "base_model", base).register_forward_pre_hook(self._see, with_kwargs=True)]
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.router.register_forward_hook(partial(self._count, index)))

    def close(self) -> None:
        """Stops counting."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "RouterMeter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def take(self) -> list[Load]:
        """Returns the load of every layer since the last call, over all processes, and starts again."""
        sums = self._sums
        self._reset()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in sums:
                torch.distributed.all_reduce(total)
        return [Load(total[:-2], total[-2], total[-1]) for total in sums]

    def _reset(self) -> None:
        # One vector a layer: the picks of every expert, the sum of entropies, the number of tokens.
        self._sums = [torch.zeros(len(one.learned) + 2, device=one.learned.device) for one in self.layers]

    def _see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask.reshape(-1) > 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._counting = torch.is_grad_enabled() or not self.training

    @torch.no_grad()
    def _count(self, index: int, module: nn.Module, args: tuple, output: tuple) -> None:
        if not self._counting:
            return
        logits, chosen = (part.reshape(-1, part.shape[-1]) for part in (output[0], output[2]))
        if self._mask is not None and len(self._mask) == len(chosen):
            logits, chosen = logits[self._mask], chosen[self._mask]
        experts, probs = logits.shape[-1], logits.float().softmax(-1)
        sums = self._sums[index]
        sums[:-2] += torch.bincount(chosen.reshape(-1), minlength=experts)
        sums[-2] += torch.special.entr(probs).sum() / math.log(experts)
        sums[-1] += len(probs)


@dataclass
class RoutedLayerReport:
    """
    Findings in a layer; the docstring of the module defines the numbers.

    Attributes:
        name (`str`): Name of the block in the model.
        load (`list[float]`): Share of every expert in all choices.
        max_vio, batch_max_vio (`float`): Over all tokens, and the mean over batches.
        dead (`int`): Experts that were never chosen.
        load_entropy, entropy (`float`): In [0, 1].
        row_cosine (`float`): Mean |cos| between two rows of the router that is used.
        lambda_learned, lambda_effective, lambda_random (`float`, *optional*): Mean over experts; `None` where the
            experts' matrices are not known.
    """

    name: str
    load: list[float]
    max_vio: float
    batch_max_vio: float
    dead: int
    load_entropy: float
    entropy: float
    row_cosine: float
    lambda_learned: float | None = None
    lambda_effective: float | None = None
    lambda_random: float | None = None


@dataclass
class RouterReport:
    """
    Findings in a model.

    Attributes:
        mpi (`bool`): Whether its routers are MPI's.
        tokens (`int`): Tokens that were looked at.
        layers (`list[RoutedLayerReport]`): Its layers.
        notes (`list[str]`): What stands out.
    """

    mpi: bool
    tokens: int
    layers: list[RoutedLayerReport]
    notes: list[str] = field(default_factory=list)

    def mean(self, name: str) -> float | None:
        """Returns the mean of an attribute over the layers that have it."""
        values = [value for layer in self.layers if (value := getattr(layer, name)) is not None]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes, for JSON."""
        return asdict(self)


@torch.no_grad()
def examine(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], seed: int = 0) -> RouterReport:
    """
    Runs a mixture of experts over batches and reports on its routers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Mixture of experts. It is put into evaluation mode for the time of the call.
        batches (`Iterable[Mapping[str, torch.Tensor]]`):
            What its forward takes: `input_ids` `(B, L)` and, with padding, `attention_mask`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random rows.

    Returns:
        [`RouterReport`]

    Raises:
        TypeError: The model has no mixture of experts.
        ValueError: There are no tokens.
    """
    training = model.training
    model.eval()
    base: Any = model.base_model
    with RouterMeter(model) as meter:
        loads = []
        for batch in batches:
            base(**batch, use_cache=False)
            loads.append(meter.take())
    layers = [_layer_report(layer, [load[i] for load in loads], seed + i) for i, layer in enumerate(meter.layers)]
    model.train(training)
    tokens = int(sum(load[0].tokens for load in loads))
    if not tokens:
        raise ValueError("There are no tokens to look at: give at least one batch that is not padding alone.")
    report = RouterReport(any(layer.mpi is not None for layer in meter.layers), tokens, layers)
    report.notes = _notes(report)
    return report


def _layer_report(layer: RoutedLayer, loads: list[Load], seed: int) -> RoutedLayerReport:
    picks = total_picks(loads)
    report = RoutedLayerReport(
        name=layer.name,
        load=(picks / picks.sum()).tolist(),
        max_vio=max_vio(picks),
        batch_max_vio=sum(max_vio(load.picks) for load in loads) / len(loads),
        dead=int((picks == 0).sum()),
        load_entropy=evenness(picks),
        entropy=mean_entropy(loads),
        row_cosine=row_cosine(layer.weight()),
    )
    try:
        for name, value in layer_alignments(layer, seed).items():
            setattr(report, f"lambda_{name}", value)
    except TypeError:  # packed or adapted experts: the load is worth knowing all the same
        pass
    return report


def _notes(report: RouterReport) -> list[str]:
    notes = []
    if dead := {layer.name: layer.dead for layer in report.layers if layer.dead}:
        named = ", ".join(f"{name} ({count})" for name, count in dead.items())
        notes.append(f"Experts that no token chose: {named}. More data, or a stronger balance loss.")
    effective, random = report.mean("lambda_effective"), report.mean("lambda_random")
    if effective is None:
        notes.append(
            "The experts' matrices are packed or adapted: λ cannot be measured here; look at the model they were "
            "made from."
        )
    elif report.mpi and random is not None and effective <= random:
        notes.append(
            f"The effective routers (λ {effective:.3f}) are aligned no better than one power step makes random rows "
            f"({random:.3f}): what there is comes from the step, not from training."
        )
    return notes
