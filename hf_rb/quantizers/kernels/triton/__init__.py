"""The kernels for GPUs. Importing this module needs neither Triton nor a device; its functions need both."""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from hf_rb.quantizers.kernels.layout import Layout


__all__ = ["available", "dequantize", "matmul", "supports"]

ACTIVATION_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device) -> bool:
    """Returns whether Triton is installed and `device` is a GPU that it compiles for."""
    return device.type == "cuda" and _has_triton() and _is_recent(device)


def supports(dtype: torch.dtype, layout: Layout) -> bool:
    """Returns whether [`matmul`] and [`dequantize`] take this type and this layout, on any available device."""
    from hf_rb.quantizers.kernels.triton.digits import recipe

    return dtype in ACTIVATION_TYPES and layout.group_size <= _gemm().MAX_GROUP and all(map(recipe, layout.parts))


def matmul(input: Tensor, weight: Tensor, weight_scale: Tensor, layout: Layout) -> Tensor:
    """See [`~hf_rb.quantizers.kernels.triton.gemm.matmul`]."""
    return _gemm().matmul(input, weight, weight_scale, layout)


def dequantize(weight: Tensor, weight_scale: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """See [`~hf_rb.quantizers.kernels.triton.decode.dequantize`]."""
    return _gemm().dequantize(weight, weight_scale, layout, dtype)


def _gemm() -> ModuleType:
    from hf_rb.quantizers.kernels.triton import gemm

    return gemm


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
