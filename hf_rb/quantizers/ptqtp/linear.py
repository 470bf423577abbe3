"""The quantized linear layer, and what it has in common with quantized experts."""

import torch
from torch import Tensor, nn

from hf_rb._fields import value_problem
from hf_rb.quantizers import kernels
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.packing import layout_of


__all__ = ["PTQTPLinear", "PackedModule"]


class PackedModule(nn.Module):
    """
    A module with packed parameters: each has a companion `<name>_scale` in float16.

    Attributes:
        layouts (`dict[str, Layout]`): The kernels' layout of every packed parameter.
        activations (`str`): See [`PTQTPConfig`].
    """

    layouts: dict[str, Layout]

    @property
    def activations(self) -> str:
        return self._activations

    @activations.setter
    def activations(self, value: str) -> None:
        if problem := value_problem("activations", value, choices=("exact", "int8")):
            raise ValueError(problem)
        self._activations = value

    def add_packed(self, name: str, rows: tuple[int, ...], layout: Layout, device: torch.device | None = None) -> None:
        """Adds the frozen parameters `<name>` `(*rows, row_bytes)` and `<name>_scale` `(*rows, groups, planes)`."""
        weight = torch.empty(*rows, layout.row_bytes, dtype=torch.uint8, device=device)
        scale = torch.empty(*rows, layout.groups, layout.num_scales, dtype=torch.float16, device=device)
        setattr(self, name, nn.Parameter(weight, requires_grad=False))
        setattr(self, f"{name}_scale", nn.Parameter(scale, requires_grad=False))

    def unpacked(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weights `(*rows, in_features)` of a packed parameter."""
        return kernels.dequantize(getattr(self, name), getattr(self, f"{name}_scale"), self.layouts[name], dtype)

    def restore_scales(self) -> None:
        """Makes the scales float16 again, which `prepare_model_for_kbit_training` of PEFT casts to float32."""
        for name in self.layouts:
            scale = getattr(self, f"{name}_scale")
            if scale.dtype is not torch.float16:
                scale.data = scale.data.half()

    def _apply(self, fn, recurse: bool = True):
        # `model.to(torch.bfloat16)` means the activations: scales rounded once more would be another model.
        scales = {name: getattr(self, f"{name}_scale").data for name in self.layouts}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            parameter = getattr(self, f"{name}_scale")
            if parameter.dtype != scale.dtype:
                parameter.data = scale.to(parameter.device)
        kernels.forget()
        return self


class PTQTPLinear(PackedModule, nn.Linear):
    """
    A linear layer whose weight is stored as trit-planes.

    It is an `nn.Linear` for everything that looks for one (LoRA's `all-linear`, device maps). `weight` is a frozen uint8
    parameter `(out_features, layout.row_bytes)` in the kernels' layout, `weight_scale` a frozen float16 parameter
    `(out_features, ceil(in_features / group_size), planes)`; gradients flow to the input and the bias.

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
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.layout = layout_of(in_features, config.group_size, planes or config.planes)
        self.layouts = {"weight": self.layout}
        self.activations = config.activations
        self.add_packed("weight", (out_features,), self.layout, device)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight `(out_features, in_features)`."""
        return self.unpacked("weight", dtype)

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Returns an ordinary layer."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        self.restore_scales()
        return kernels.linear(input, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, planes={self.layout.num_scales}, group_size={self.layout.group_size}"
