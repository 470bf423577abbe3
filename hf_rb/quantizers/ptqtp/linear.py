"""The linear layer whose weight is trit-planes."""

import torch

from hf_rb.quantizers.packed.linear import PackedLinear
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.format import layout_of


__all__ = ["PTQTPLinear"]


class PTQTPLinear(PackedLinear):
    """
    A linear layer whose weight is stored as trit-planes.

    `weight` is a frozen uint8 parameter `(out_features, layout.row_bytes)` in the kernels' layout, `weight_scale` a frozen
    float16 parameter `(out_features, ceil(in_features / group_size), planes)`; gradients flow to the input and the bias.

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
