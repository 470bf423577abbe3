"""Quartet: round to nearest on the four levels -3, -1, 1, 3 times a scale for each group of weights.

    w = scale * (2 code - 3),    scale = clip * max |w| / 3,    code = round((w / scale + 3) / 2) in 0..3

A code takes two bits, four codes a byte, in files as in memory (`hf_rb/quantizers/kernels/layout.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from hf_rb.methods import QuantizerMethod, flag
from hf_rb.quantizers.config import PackedConfig
from hf_rb.quantizers.kernels.layout import Layout, Part, pack
from hf_rb.quantizers.loading.matrices import Solved
from hf_rb.quantizers.loading.quantizer import PackingQuantizer
from hf_rb.quantizers.packed.weight import PackedWeight
from hf_rb.utils.fields import documented


def _rules(config):
    if config.group_size % 4:
        yield f"`group_size` must be a multiple of 4, so that a group fills its bytes; got {config.group_size}."


METHOD = QuantizerMethod(
    key="quartet",
    name="Quartet",
    summary="Rounding to four levels with one scale for a group of weights.",
    config="hf_rb_example.quartet:QuartetConfig",
    quantizer="hf_rb_example.quartet:QuartetQuantizer",
    memory_bits=lambda config: 2 + 16 / config.group_size,
    rules=_rules,
    trial={"clip": 0.7},
)
LEVELS = Part(2, ((-3, -1, 1, 3),))


@documented
@dataclass
class QuartetConfig(PackedConfig):
    """Configuration of Quartet."""

    record: ClassVar[QuantizerMethod] = METHOD

    quant_method: str = flag("quartet", "The method's name.", choices=("quartet",))
    group_size: int = flag(64, "Neighbouring weights of a row that share their scale.", range="[1, inf)")
    clip: float = flag(0.8, "Largest level of a group, as a part of its largest weight.", range="(0, 1]")


class QuartetQuantizer(PackingQuantizer):
    """Rounds a model to four levels while it loads, or loads one that is rounded already."""

    quantization_config: QuartetConfig

    def layout_of(self, name, in_features, units):
        return Layout(in_features, self.quantization_config.group_size, (LEVELS,))

    def solve(self, layout, matrix):
        matrix = matrix.float()
        if not matrix.isfinite().all():
            raise ValueError("The weight has a NaN or an infinite value.")
        groups = F.pad(matrix, (0, -matrix.shape[1] % layout.group_size)).unflatten(1, (-1, layout.group_size))
        scale = (self.quantization_config.clip * groups.abs().amax(-1) / 3).half()
        levels = scale.float()[..., None]
        codes = ((groups / levels).nan_to_num() + 3).div(2).round().clamp(0, 3)
        rounded = ((2 * codes - 3) * levels).flatten(1)[:, : matrix.shape[1]]
        error = ((rounded - matrix).norm() / matrix.norm()).nan_to_num().item()
        packed = pack([codes.byte().flatten(1)[:, : matrix.shape[1]]], layout)
        return Solved(PackedWeight(packed, scale[..., None]), error, resolved=False)

    def to_file(self, layout, weight):
        return weight

    def from_file(self, layout, stored, parameter):
        rows = stored.packed.shape[:-1]
        scales = torch.float16, (*rows, layout.groups, 1)
        stored.check("four levels", packed=(torch.uint8, (*rows, layout.row_bytes)), scale=scales)
        return stored
