"""The linear layer and the fused experts whose weights are trit-planes."""

import torch
from torch import nn

from hf_rb.quantizers.packed.experts import PackedExperts, input_size
from hf_rb.quantizers.packed.linear import PackedLinear
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.format import layout_of


__all__ = ["PTQTPExperts", "PTQTPLinear"]


class PTQTPLinear(PackedLinear):
    """
    A linear layer whose weight is stored as trit-planes.

    `weight` is a frozen uint8 parameter `(out_features, layout.row_bytes)` in the kernels' layout, `weight_scale` a
    frozen float16 parameter `(out_features, ceil(in_features / group_size), planes)`; gradients flow to the input and
    the bias.

    Args:
        in_features (`int`):
            Size of the input.
        out_features (`int`):
            Size of the output.
        bias (`bool`):
            Whether there is a bias.
        config ([`PTQTPConfig`]):
            Gives `group_size` and `activations`.
        planes (`int`, *optional*):
            Ternary planes of this layer. Defaults to `config.planes`.
        device (`torch.device`, *optional*):
            Where the parameters are.
        dtype (`torch.dtype`, *optional*):
            Type of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: PTQTPConfig,
        planes: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        layout = layout_of(in_features, config.group_size, planes or config.planes)
        super().__init__(in_features, out_features, bias, layout, config.activations, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, planes={self.layout.num_scales}, group_size={self.layout.group_size}"


class PTQTPExperts(PackedExperts):
    """
    Stands in for a fused experts module of transformers, with one or both of its weights stored as trit-planes.

    A packed projection is uint8 `(experts, out, layout.row_bytes)`, with float16 scales
    `(experts, out, groups, planes)`.

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
