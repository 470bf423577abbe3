"""Fused experts whose weights are trit-planes."""

from torch import nn

from hf_rb.quantizers.packed.experts import PackedExperts, input_size
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.format import layout_of


__all__ = ["PTQTPExperts"]


class PTQTPExperts(PackedExperts):
    """
    Stands in for a fused experts module of transformers, with one or both of its weights stored as trit-planes.

    A packed projection is uint8 `(experts, out, layout.row_bytes)`, with float16 scales `(experts, out, groups, planes)`.

    Args:
        experts (`nn.Module`):
            The module it stands in for, whose weights may be on the meta device.
        config ([`PTQTPConfig`]):
            Gives `group_size` and `activations`.
        planes (`dict[str, int]`):
            Ternary planes of the projections that are packed; the others stay as they are.
    """

    def __init__(self, experts: nn.Module, config: PTQTPConfig, planes: dict[str, int]):
        layouts = {
            name: layout_of(input_size(experts, name), config.group_size, count) for name, count in planes.items()
        }
        super().__init__(experts, layouts, config.activations)

    def extra_repr(self) -> str:
        planes = ", ".join(f"{name}={layout.num_scales}" for name, layout in self.layouts.items())
        return f"{self.num_experts} of {self.experts_class.__name__}, planes: {planes}"
