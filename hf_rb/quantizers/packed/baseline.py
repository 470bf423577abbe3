"""Round-to-nearest: what every quantizer of ours is compared with."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_rb.quantizers.packed.linear import PackedModule


__all__ = ["packed_weights", "round_to_nearest", "round_weights", "rtn"]

# So many weights of a matrix are rounded to learn the error.
SAMPLE = 1 << 18


def round_to_nearest(weight: Tensor, bits: int = 4, group_size: int = 128, symmetric: bool = False) -> Tensor:
    """
    Rounds a matrix to the uniform grid between the extremes of each group, with a float16 scale.

    Args:
        weight (`torch.Tensor`):
            Matrix `(out_features, in_features)`, any floating type.
        bits (`int`, *optional*, defaults to `4`):
            Bits of a code.
        group_size (`int`, *optional*, defaults to `128`):
            Neighbours in a row that share a scale. A last group may be shorter.
        symmetric (`bool`, *optional*, defaults to `False`):
            A grid around zero, instead of one with an integer zero point of `bits` bits.

    Returns:
        `torch.Tensor`: The rounded matrix in float32.
    """
    last, columns = 2**bits - 1, weight.shape[1]
    # Zeros that fill up a short last group change neither extremes nor grid, which both hold zero.
    groups = F.pad(weight.float(), (0, -columns % group_size)).unflatten(1, (-1, group_size))
    if symmetric:
        scale = (2 * groups.abs().amax(-1, keepdim=True) / last).half().float()
        zero = torch.full_like(scale, (last + 1) / 2)
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / last).half().float()
        zero = (-low / scale).round().clamp(0, last)
    codes = (groups / scale).round().add(zero).clamp(0, last)
    return torch.where(scale > 0, (codes - zero) * scale, 0).flatten(1)[:, :columns]


def rtn(weight: Tensor, bits: int = 4, group_size: int = 128) -> tuple[float, int]:
    """
    Returns what [`round_to_nearest`] with zero points would make of a matrix: its relative error on rows at equal
    distances, about 260,000 weights, and the bytes of the codes, scales and zero points of all rows, without a gap.
    """
    rows = weight[:: max(1, weight.numel() // SAMPLE)].float()
    norm = rows.norm()
    error = ((round_to_nearest(rows, bits, group_size) - rows).norm() / norm).item() if norm else 0.0
    groups = weight.shape[0] * -(-weight.shape[1] // group_size)
    return error, -(-(weight.numel() * bits + groups * (16 + bits)) // 8)


def packed_weights(model: nn.Module) -> list[str]:
    """Returns the names that the packed weights of a model have in a [`~hf_rb.quantizers.Report`]."""
    packed = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedModule))
    return [f"{name}.{weight}".removesuffix(".weight") for name, module in packed for weight in module.layouts]


@torch.no_grad()
def round_weights(model: nn.Module, names: Iterable[str], bits: int = 4, group_size: int = 128) -> bool:
    """
    Rounds weights of an ordinary model in place, as [`round_to_nearest`] does, in the groups in which the quantizers
    see them.

    Args:
        model (`nn.Module`):
            The model.
        names (`Iterable[str]`):
            Linear layers, and parameters of fused experts, by name.
        bits, group_size (`int`, *optional*, default to `4` and `128`):
            Those of [`round_to_nearest`].

    Returns:
        `bool`: `False` if the model has another structure: a name is missing, and nothing was changed.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    found = [(name, parameters.get(f"{name}.weight", parameters.get(name))) for name in names]
    weights = [(name, weight) for name, weight in found if weight is not None]
    if len(weights) < len(found):
        return False
    for name, weight in weights:
        owner = modules.get(name, modules[name.rpartition(".")[0]])
        turned = isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False)  # rows are the inputs
        matrices = weight.data if weight.ndim == 3 else weight.data[None]
        for matrix in matrices.mT if turned else matrices:
            matrix.copy_(round_to_nearest(matrix, bits, group_size))
    return True
