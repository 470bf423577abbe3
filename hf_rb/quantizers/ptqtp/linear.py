"""The quantized linear layer."""

import torch
from torch import Tensor, nn

from hf_rb.quantizers import kernels
from hf_rb.quantizers.kernels import reference
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.packing import dequantize, packed_width


__all__ = ["PTQTPLinear"]


class PTQTPLinear(nn.Linear):
    """
    A linear layer whose weight is stored as trit-planes.

    It is an `nn.Linear` for everything that looks for one (LoRA's `all-linear`, device maps). `weight` is a frozen uint8
    parameter `(out_features, bytes of a row)`, `weight_scale` a frozen float16 parameter
    `(out_features, ceil(in_features / group_size), planes)`; gradients flow to the input and the bias. A forward pass
    multiplies by a dequantized copy, which is kept until the layer changes or moves
    (`hf_rb/quantizers/kernels/reference.py`).

    Args:
        in_features (`int`):
            Size of the input.
        out_features (`int`):
            Size of the output.
        bias (`bool`):
            Whether there is a bias.
        config ([`PTQTPConfig`]):
            Gives `group_size` and `packing`.
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
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.config = config
        self.planes = planes or config.planes
        width = packed_width(in_features, config.group_size, self.planes, config.packing)
        groups = -(-in_features // config.group_size)
        weight = torch.empty(out_features, width, dtype=torch.uint8, device=device)
        scale = torch.empty(out_features, groups, self.planes, dtype=torch.float16, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight `(out_features, in_features)`."""
        tensors = {"weight": self.weight, "weight_scale": self.weight_scale}
        return dequantize(tensors, self.config, self.in_features, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return kernels.linear(input, self)

    def _apply(self, fn, recurse: bool = True):
        # `model.to(torch.bfloat16)` means the activations: scales rounded once more would be another model.
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        reference.forget(self)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, planes={self.planes}, group_size={self.config.group_size}"
