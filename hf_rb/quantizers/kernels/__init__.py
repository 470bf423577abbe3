"""Multiplication by a quantized matrix: one function, whatever the device.

What is chosen, in this order:

- in main memory, float32, bfloat16 and float16 activations, on a processor with AVX-512 (VNNI) or AVX2: the C kernel
  for few rows of activations, panels of the expanded matrix through torch's multiplication for many
  (`hf_rb/quantizers/kernels/cpu`);
- on a GPU with Triton: its kernels (`hf_rb/quantizers/kernels/triton`);
- otherwise the dequantized matrix, which is kept, after a warning (`hf_rb/quantizers/kernels/reference.py`). That is
  the way of processors without these instructions: there the C kernel, 12.0 ms for one row of activations and 4096 x
  4096 weights, only unpacks, and the kept matrix, 2.0 ms in bfloat16 and 3.1 ms in float32, multiplies.

Tied scales would also fit torch's int4 multiplication for processors. It is not used: it needs a second copy of the
weights and rounds the scales to bfloat16. `int8` takes .89 of its time at one row of activations, torch's is faster
from 2 to 16 (`benchmarks/results/ptqtp_kernels.md`).

Rounding activations to 8 bits (`activations="int8"`) costs a relative error of 0.65 % of the output: Gaussian
activations and weights, groups of 128, every instruction set.

Compiled and traced models, and those that need a gradient, see one operator, `hf_rb::lut_linear`.

A process that has multiplied on more than one thread must not be forked: like torch's own multiplication, the child
would wait for OpenMP threads that it does not have. Start processes with `spawn`.
"""

from typing import Any

import torch
from torch import Tensor

from hf_rb.quantizers.kernels import cpu, reference, triton
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.kernels.reference import forget


__all__ = ["ACTIVATIONS", "dequantize", "forget", "linear", "matmul"]

ACTIVATIONS = ("exact", "int8")


def linear(input: Tensor, layer: Any) -> Tensor:
    """
    Returns `input @ weight.T + bias` `(..., out_features)` for a quantized layer.

    Args:
        input (`torch.Tensor`):
            Activations `(..., in_features)`.
        layer (`torch.nn.Module`):
            Has `weight`, `weight_scale`, `bias`, `layout` and `activations`.
    """
    return matmul(input, layer.weight, layer.weight_scale, layer.layout, layer.bias, layer.activations)


def matmul(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    layout: Layout,
    bias: Tensor | None = None,
    activations: str = "exact",
) -> Tensor:
    """
    Returns `input @ weight.T + bias` `(..., out_features)` for a packed matrix. Gradients flow to the input and the
    bias. Under autocast, input and bias are cast as `torch.nn.functional.linear` casts them.

    Args:
        input (`torch.Tensor`):
            Activations `(..., in_features)`.
        weight (`torch.Tensor`):
            uint8 `(out_features, layout.row_bytes)`.
        weight_scale (`torch.Tensor`):
            float16 `(out_features, layout.groups, layout.num_scales)`.
        layout ([`~kernels.layout.Layout`]):
            What the bytes mean.
        bias (`torch.Tensor`, *optional*):
            `(out_features,)`.
        activations (`str`, *optional*, defaults to `"exact"`):
            `"int8"` lets the C kernel round one to three rows of activations to 8 bits, with a scale for each group of
            the weight: faster, with a relative error of 0.65 %. More rows are exact, which is faster then.

    Raises:
        ValueError: `activations` has another value, or the input another size than the weight.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"`activations` must be 'exact' or 'int8'; got {activations!r}.")
    input, bias = _autocast(input), None if bias is None else _autocast(bias)
    direct = type(input) is Tensor and not torch.compiler.is_compiling()
    if direct and not (input.requires_grad and torch.is_grad_enabled()):
        output = _forward(input, weight, weight_scale, layout, activations)
    else:
        output = lut_linear(input, weight, weight_scale, layout.key, activations)
    return output if bias is None else output + bias


def dequantize(weight: Tensor, weight_scale: Tensor, layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the numbers `(..., in_features)` of packed rows `(..., row_bytes)`."""
    shape = weight.shape[:-1]
    weight, scale = weight.detach().flatten(0, -2), weight_scale.detach().flatten(0, -3)
    if weight.device.type == "cpu" and (kernel := cpu.kernel()) and kernel.takes(torch.float32, weight, scale, layout):
        matrix = kernel.dequantize(weight, scale, layout, dtype)
    elif _on_gpu(weight) and triton.supports(dtype, layout):
        matrix = triton.dequantize(weight, scale, layout, dtype)
    else:
        matrix = reference.dequantize(weight, scale, layout, dtype)
    return matrix.unflatten(0, shape)


@torch.library.custom_op("hf_rb::lut_linear", mutates_args=())
def lut_linear(input: Tensor, weight: Tensor, weight_scale: Tensor, layout: str, activations: str) -> Tensor:
    """[`matmul`] as an operator, with `layout.key`."""
    return _forward(input, weight, weight_scale, Layout.from_key(layout), activations)


@lut_linear.register_fake
def _(input: Tensor, weight: Tensor, weight_scale: Tensor, layout: str, activations: str) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, ctx.layout, _ = inputs
    ctx.save_for_backward(weight, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale = ctx.saved_tensors
    return lut_linear_backward(grad, weight, scale, ctx.layout), None, None, None, None


lut_linear.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("hf_rb::lut_linear_backward", mutates_args=())
def lut_linear_backward(grad: Tensor, weight: Tensor, weight_scale: Tensor, layout: str) -> Tensor:
    """Returns `grad @ weight` `(..., in_features)`."""
    return _transposed(grad, weight, weight_scale, Layout.from_key(layout))


@lut_linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, weight_scale: Tensor, layout: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], Layout.from_key(layout).in_features)


def _autocast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    if kind == "meta" or tensor.dtype is torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu" and triton.available(tensor.device)


def _is_half_on_cpu(tensor: Tensor) -> bool:
    # No kernel for processors takes float16, and torch's own multiplications are slow in it.
    return tensor.dtype is torch.float16 and tensor.device.type == "cpu"


def _forward(input: Tensor, weight: Tensor, scale: Tensor, layout: Layout, activations: str) -> Tensor:
    if input.shape[-1] != layout.in_features:
        raise ValueError(f"The input has {input.shape[-1]} features, the weight has {layout.in_features}.")
    if _is_half_on_cpu(input):
        return _forward(input.float(), weight, scale, layout, activations).half()
    if input.device.type == "cpu" and (kernel := cpu.kernel()) and kernel.takes(input.dtype, weight, scale, layout):
        if kernel.decodes:
            return kernel.linear(input, weight, scale, layout, activations == "int8")
    elif _on_gpu(input) and triton.supports(input.dtype, layout):
        return triton.matmul(input, weight, scale, layout)
    return reference.linear(input, weight, scale, layout)


def _transposed(grad: Tensor, weight: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    if _is_half_on_cpu(grad):
        return _transposed(grad.float(), weight, scale, layout).half()
    if grad.device.type == "cpu" and (kernel := cpu.kernel()) and kernel.takes(grad.dtype, weight, scale, layout):
        return kernel.matmul_transposed(grad, weight, scale, layout)
    if _on_gpu(grad) and triton.supports(grad.dtype, layout):
        return grad @ triton.dequantize(weight, scale, layout, grad.dtype)
    return grad @ reference.matrix(weight, scale, layout, grad.dtype)
