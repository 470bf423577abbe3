"""Round-to-nearest: what every quantizer of ours is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor


__all__ = ["round_to_nearest", "rtn_bits", "rtn_error"]

# Rows of a matrix are taken at equal distances until they hold about so many weights.
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


def rtn_bits(bits: int = 4, group_size: int = 128, symmetric: bool = False) -> float:
    """Returns the bits of a weight with its share of a float16 scale and a zero point of `bits` bits."""
    return bits + (16 + (0 if symmetric else bits)) / group_size


def rtn_error(weight: Tensor, bits: int = 4, group_size: int = 128) -> float:
    """Returns the relative error of [`round_to_nearest`] on rows of a matrix at equal distances, about 260,000 weights."""
    step = max(1, weight.numel() // SAMPLE)
    rows = weight[::step].float()
    norm = rows.norm()
    return ((round_to_nearest(rows, bits, group_size) - rows).norm() / norm).item() if norm else 0.0
