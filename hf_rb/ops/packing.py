"""Measures on a batch whether a model keeps the sequences of a packed row apart: no list of architectures could say
it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hf_rb.ops.backbone import backbone_output, name_of, undisturbed
from hf_rb.ops.processes import on_any_process
from hf_rb.ops.rounding import coarsest_eps
from hf_rb.ops.sequences import Sequences


__all__ = ["Leak", "LeakingPacking", "is_packed", "leak_message", "measure_leak"]

# How many tokens of a sequence are compared: what comes before it reaches its first tokens most.
TOKENS = 4
# Relative difference that float32 may make of one computation in two shapes: 1e-6 after a few layers, 1e-5 after a
# hundred.
ROUNDING = 1e-4


class Leak(NamedTuple):
    """
    Result of [`measure_leak`].

    Attributes:
        difference (`float`):
            Relative difference of hidden states.
        ratio (`float`):
            The same, divided by what rounding may make of it: above 1 the model does not keep sequences apart.
    """

    difference: float = 0.0
    ratio: float = 0.0


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Says whether a row of a collated batch holds a sequence of two tokens or more behind another one."""
    return _behind_another(inputs) is not None


def _behind_another(inputs: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Returns row, start and end of the longest sequence that is not the first of its row. A token of padding is
    none.
    """
    positions, width = inputs.get("position_ids"), inputs["input_ids"].shape[-1]
    if positions is None or positions.shape != inputs["input_ids"].shape:
        return None
    found, last_row = [], None
    for start, stop in Sequences(inputs).spans():
        row, offset = divmod(start, width)
        if row == last_row and stop - start > 1:
            found.append((row, offset, offset + stop - start))
        last_row = row
    return max(found, key=lambda one: one[2] - one[1]) if found else None


def measure_leak(model: PreTrainedModel, inputs: Mapping[str, Any], **kwargs: Any) -> Leak:
    """
    Compares a sequence in a packed batch with the same sequence alone, in evaluation mode.

    Where the two are the same up to the rounding of float32, one pass over the batch is all. Else half precision or a
    leak may be why, and two more passes decide: the batch with one token in place of all others outside the sequence,
    in the same kernels, where nothing of the sequence may change; and the sequence with another row beside it, which
    says what rounding and the limited capacity of experts change without any packing. A model that gives NaN is not
    judged.

    Modes, buffers and random states are left as they were.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Unwrapped model. Under FSDP or DeepSpeed, call this inside the wrapper's forward, on all processes.
        inputs (`Mapping`):
            Collated batch. One that is not packed has no leak; it is for a process that other processes must not wait
            for.
        **kwargs:
            More arguments of the backbone's forward for the batch.

    Returns:
        [`Leak`]: Of this process.
    """
    place, ids = _behind_another(inputs), inputs["input_ids"]
    row, start, stop = place or (0, 0, ids.shape[-1])
    own = ids[row : row + 1, start:stop]

    def hidden(batch: Mapping[str, Any], row: int, start: int, **kwargs: Any) -> torch.Tensor:
        # Some models change `position_ids` in place.
        copies = {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}
        return backbone_output(model, copies, **kwargs)[0][row, start : start + min(TOKENS, own.shape[1])]

    with undisturbed(model):
        packed, alone = hidden(inputs, row, start, **kwargs), hidden({"input_ids": own}, 0, 0)
        is_judged = place is not None and bool(alone.isfinite().all())
        difference = _apart(packed, alone) if is_judged else 0.0
        if not on_any_process(difference > ROUNDING):
            return Leak(difference)
        exchanged = torch.full_like(ids, own[0, -1].item())
        exchanged[row, start:stop] = own
        changed = hidden({**inputs, "input_ids": exchanged}, row, start, **kwargs)
        beside = hidden({"input_ids": torch.cat([own, own.flip(-1)])}, 0, 0)
    if difference <= ROUNDING:
        return Leak(difference)
    eps = coarsest_eps(packed.device, packed.dtype, getattr(model, "dtype", packed.dtype))
    noise = 10 * _apart(beside, alone)
    influence = _apart(changed, packed) / max(ROUNDING, eps / 2, noise)
    # A model that separates, but counts positions from the start of the row, is found by the first difference alone.
    return Leak(difference, max(influence, difference / max(10 * ROUNDING, 16 * eps, noise)))


class LeakingPacking(ValueError):
    """Says that a model lets packed sequences see each other."""


def leak_message(model: PreTrainedModel, leak: Leak) -> str:
    """Returns why a model is refused, and the remedy."""
    return (
        f"{name_of(model)} does not keep the sequences of a packed row apart: the hidden states of one differ by "
        f"{leak.difference:.2g} (relative) from those of the same sequence alone. Set `packing: false` and "
        "`padding_free: false`, or use a model or an attention implementation that separates them; "
        "`allow_leaking_packing: true` trains all the same, as TRL does."
    )


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the lower median over tokens (n, H) of the relative difference: one token may have gone to another
    expert.
    """
    one, other = one.float(), other.float()
    return ((one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-12)).nan_to_num(torch.inf).median().item()
