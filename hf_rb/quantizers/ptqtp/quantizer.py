"""PTQTP as a quantization backend of `from_pretrained(..., quantization_config=PTQTPConfig())`."""

from dataclasses import replace

import torch
from torch import Tensor

from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.loading.matrices import Solved
from hf_rb.quantizers.loading.quantizer import PackingQuantizer
from hf_rb.quantizers.packed.weight import PackedWeight
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.format import layout_of, repack
from hf_rb.quantizers.ptqtp.layers import PTQTPExperts, PTQTPLinear
from hf_rb.quantizers.ptqtp.solver import quantize_matrix


__all__ = ["PTQTPQuantizer"]

_SOLVER_OPTIONS = ("max_iter", "tol", "tol_mode", "scale_mode", "multistart")


class PTQTPQuantizer(PackingQuantizer):
    """Quantizes a model to trit-planes while it loads, or loads one that is quantized already."""

    linear_class, experts_class = PTQTPLinear, PTQTPExperts
    quantization_config: PTQTPConfig  # pyrefly: ignore[bad-override-mutable-attribute]

    def layout_of(self, name: str, in_features: int, units: int) -> Layout:
        return layout_of(in_features, self.quantization_config.group_size, units)

    def solve(self, layout: Layout, matrix: Tensor) -> Solved:
        options = {name: getattr(self.quantization_config, name) for name in _SOLVER_OPTIONS}
        packed, scale, error, resolved = quantize_matrix(matrix, layout.group_size, layout.num_scales, **options)
        return Solved(PackedWeight(packed, scale), error, resolved)

    def to_file(self, layout: Layout, weight: PackedWeight) -> PackedWeight:
        return replace(weight, packed=repack(weight.packed, layout, "nibble", self.quantization_config.packing))

    def from_file(self, layout: Layout, stored: PackedWeight, parameter: str) -> PackedWeight:
        scales = torch.float16, (*stored.packed.shape[:-1], layout.groups, layout.num_scales)
        stored.check("trit-planes", scale=scales)
        return replace(stored, packed=repack(stored.packed, layout, self.quantization_config.packing, "nibble"))
