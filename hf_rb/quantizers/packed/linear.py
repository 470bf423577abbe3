"""Packed layers, whatever the method: bytes in the kernels' layout, with what turns them into numbers beside them.

A packed parameter `<name>` is uint8 `(*rows, layout.row_bytes)`. In memory it has a companion `<name>_scale`, float16
`(*rows, groups, scales of a group)`, and may have `<name>_column`, float32, a factor of every input. All of them are
frozen parameters: what places, offloads and saves a model knows parameters best.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_rb.quantizers import kernels
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.packed.layer_kinds import is_transposed
from hf_rb.quantizers.packed.weight import SUFFIXES, PackedWeight
from hf_rb.utils.fields import value_problem


__all__ = ["PackedLinear", "PackedModule", "scaled"]


class PackedModule(nn.Module):
    """
    A module with packed parameters.

    Attributes:
        layouts (`dict[str, Layout]`): The kernels' layout of every packed parameter.
        activations (`str`): `"exact"`, or `"int8"` to let a kernel round its input to 8 bits where that is faster.
    """

    is_packed_module = True  # tells our layers, and those derived from them, without an import
    layouts: dict[str, Layout]
    is_transposed: bool  # whether the ordinary module keeps its weights with the inputs first
    is_concatenated: bool  # of experts: whether gate and up follow each other, and do not alternate
    _activations: str
    _is_hf_initialized: bool

    @property
    def activations(self) -> str:
        return self._activations

    @activations.setter
    def activations(self, value: str) -> None:
        if problem := value_problem("activations", value, choices=("exact", "int8")):
            raise ValueError(problem)
        self._activations = value

    def add_packed(
        self,
        name: str,
        rows: tuple[int, ...],
        layout: Layout,
        device: torch.device | str | None = None,
        column: bool = False,
    ) -> None:
        """Adds the parameters `<name>`, `<name>_scale` and, if asked for, `<name>_column`
        `(*rows[:-1], in_features)`.
        """
        weight = PackedWeight(
            torch.empty(*rows, layout.row_bytes, dtype=torch.uint8, device=device),
            torch.empty(*rows, layout.groups, layout.num_scales, dtype=torch.float16, device=device),
        )
        if column:
            weight.column = torch.empty(*rows[:-1], layout.in_features, device=device)
        self.set_packed(name, weight)

    def set_packed(self, name: str, weight: PackedWeight) -> None:
        """Makes frozen parameters of a packed weight."""
        for parameter, tensor in weight.named(name).items():
            setattr(self, parameter, nn.Parameter(tensor, requires_grad=False))

    def packed_weight(self, name: str) -> PackedWeight:
        """Returns a packed parameter with those that stand beside it."""
        scale, column = name + SUFFIXES["scale"], name + SUFFIXES["column"]
        return PackedWeight(getattr(self, name), getattr(self, scale), getattr(self, column, None))

    def is_packed(self, parameter: str) -> bool:
        """Returns whether a parameter is packed, or stands beside one that is."""
        return any(parameter in self.packed_weight(name).named(name) for name in self.layouts)

    def described(self, name: str) -> str:
        """Says how a packed parameter is stored, in the text of a model."""
        return f"bits={sum(part.bits for part in self.layouts[name].parts)}"

    def unpacked(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weights `(*rows, in_features)` of a packed parameter."""
        return self.packed_weight(name).dequantize(self.layouts[name], dtype)

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns an ordinary module with the weights for which this one stands."""
        raise NotImplementedError

    def uncounted(self, only_trainable: bool = False) -> int:
        """Returns how many more weights this module stands for than its packed parameters have elements."""
        number = 0
        for name, layout in self.layouts.items():
            weight = self.packed_weight(name)
            number -= sum(one.numel() for one in weight.parts().values() if one.requires_grad or not only_trainable)
            number += 0 if only_trainable else weight.packed.shape[:-1].numel() * layout.in_features
        return number

    def restore_scales(self) -> None:
        """Makes the scales float16 again, which `prepare_model_for_kbit_training` of PEFT casts to float32."""
        for name in self.layouts:
            scale = getattr(self, name + SUFFIXES["scale"])
            if scale.dtype is not torch.float16:
                scale.data = scale.data.half()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(torch.bfloat16)` means the activations: scales rounded once more would be another model.
        before = {
            parameter: tensor.data
            for name in self.layouts
            for parameter, tensor in self.packed_weight(name).named(name).items()
            if parameter != name
        }
        super()._apply(fn, recurse)
        for name, values in before.items():
            parameter = getattr(self, name)
            if parameter.dtype != values.dtype:
                parameter.data = values.to(parameter.device)
        kernels.forget()
        return self


def scaled(input: Tensor, column: Tensor | None) -> Tensor:
    """Returns the input times the factors of its columns, in its own type."""
    return input if column is None else (input * column).to(input.dtype)


class PackedLinear(PackedModule, nn.Linear):
    """
    A linear layer whose weight is packed.

    It is an `nn.Linear` for everything that looks for one (LoRA's `all-linear`, device maps). Gradients flow to the
    input and the bias.

    Args:
        in_features (`int`):
            Size of the input.
        out_features (`int`):
            Size of the output.
        bias (`bool`):
            Whether there is a bias.
        layout ([`~hf_rb.quantizers.kernels.layout.Layout`]):
            That of the weight.
        activations (`str`, *optional*, defaults to `"exact"`):
            See [`PackedModule`].
        column (`bool`, *optional*, defaults to `False`):
            Whether every input has a factor of its own.
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
        layout: Layout,
        activations: str = "exact",
        column: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.layout = layout
        self.layouts = {"weight": layout}
        self.is_transposed = False
        self.plain_class: type[nn.Module] = nn.Linear
        self.plain_attributes: dict[str, Any] = {"in_features": in_features, "out_features": out_features}
        self.activations = activations
        self.add_packed("weight", (out_features,), layout, device, column)
        # torch's own may be None too.
        made = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.bias = made  # pyrefly: ignore[bad-assignment]

    def stand_in_for(self, module: nn.Module) -> "PackedLinear":
        """Remembers the class of an ordinary layer, which [`~PackedLinear.plain`] gives back, and returns this
        layer.
        """
        blank = vars(nn.Module())
        self.plain_class, self.is_transposed = type(module), is_transposed(module)
        self.plain_attributes = {name: value for name, value in vars(module).items() if name not in blank}
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight `(out_features, in_features)`."""
        return self.unpacked("weight", dtype)

    @property
    def W_q(self) -> Tensor:
        """The packed weight, by the name that tells PEFT to ask [`~PackedLinear.dequantize`] for the numbers."""
        return self.weight

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns an ordinary layer, of the class for which this one stands."""
        linear: Any = self.plain_class.__new__(self.plain_class)
        nn.Module.__init__(linear)
        linear.__dict__ |= self.plain_attributes
        weight = self.dequantize(dtype)
        linear.weight = nn.Parameter(weight.T.contiguous() if self.is_transposed else weight)
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.described('weight')}, group_size={self.layout.group_size}"

    def forward(self, input: Tensor) -> Tensor:
        self.restore_scales()
        return kernels.linear(scaled(input, getattr(self, "weight_column", None)), self)
