"""Whole matrices of D²Quant as tensors of a file and back, through what layers hold in memory."""

import torch

from hf_rb.quantizers.d2quant.format import code_bits, for_kernels, from_file, grids_of, is_dual, layout_of, to_file
from hf_rb.quantizers.d2quant.maths.dsq import DualCodes
from hf_rb.quantizers.d2quant.maths.grids import AffineCodes
from hf_rb.quantizers.kernels import layout as kernel_layout
from hf_rb.quantizers.packed.weight import PackedWeight


def from_kernels(layout, weight):
    """Returns the codes of a matrix in memory. Without column scales, those of sign planes are 1."""
    parts = kernel_layout.unpack(weight.packed, layout)
    numbers = parts[0] | parts[1] << 2 if len(parts) > 1 else parts[0]
    if not is_dual(layout):
        bits = code_bits(layout)
        return AffineCodes(numbers, *grids_of(weight.scale, bits), bits, layout.group_size)
    signs = torch.stack([2 * (numbers >> plane & 1).to(torch.int8) - 1 for plane in range(code_bits(layout))])
    columns = torch.ones(layout.in_features, device=signs.device) if weight.column is None else weight.column
    return DualCodes(signs, weight.scale, columns, layout.group_size)


def pack(codes):
    """Returns the tensors of file format v1, column scales among them."""
    layout = layout_of(codes.shape[1], codes.group_size, codes.bits, isinstance(codes, DualCodes))
    return to_file(layout, for_kernels(codes)).named("weight")


def unpack(tensors, in_features, group_size, bits):
    """Inverse of `pack`. Without `weight_column`, the column scales of sign planes are 1."""
    stored = PackedWeight.collect("weight", tensors.get)
    layout = layout_of(in_features, group_size, bits, dual=stored.zero is None)
    return from_kernels(layout, from_file(layout, stored, stored.column is not None))
