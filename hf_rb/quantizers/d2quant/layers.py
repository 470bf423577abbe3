"""The linear layer and the fused experts of D²Quant."""

import torch
from torch import Tensor, nn

from hf_rb.quantizers.d2quant.format import for_kernels, is_dual, layout_of
from hf_rb.quantizers.d2quant.maths.dsq import DualCodes
from hf_rb.quantizers.d2quant.maths.grids import AffineCodes
from hf_rb.quantizers.packed.experts import PackedExperts
from hf_rb.quantizers.packed.linear import PackedLinear, PackedModule


__all__ = ["D2QuantExperts", "D2QuantLinear"]


class _Codes(PackedModule):
    def described(self, name: str) -> str:
        column = ", column scales" if self.packed_weight(name).column is not None else ""
        return f"{super().described(name)}{', sign planes' if is_dual(self.layouts[name]) else ''}{column}"


class D2QuantLinear(_Codes, PackedLinear):
    """
    A linear layer whose weight has codes of 2, 3 or 4 bits, on integer grids or as sign planes.

    `weight` is a frozen uint8 parameter `(out_features, layout.row_bytes)` in the kernels' layout, `weight_scale` a
    frozen float16 parameter `(out_features, ceil(in_features / group_size), scales)`
    (`hf_rb/quantizers/d2quant/format.py`). Sign planes whose column scales are not in another layer have them as
    `weight_column`, float32 `(in_features,)`.
    """

    @classmethod
    def from_codes(cls, codes: AffineCodes | DualCodes, bias: Tensor | None = None) -> "D2QuantLinear":
        """
        Makes a layer of a quantized matrix. Sign planes keep their column scales; absorbing is for later.

        Args:
            codes (`AffineCodes` or `DualCodes`):
                The matrix.
            bias (`torch.Tensor`, *optional*):
                `(out_features,)`.
        """
        rows, columns = codes.shape
        layout = layout_of(columns, codes.group_size, codes.bits, isinstance(codes, DualCodes))
        layer = cls(columns, rows, False, layout, column=is_dual(layout), device=torch.device("meta"))
        layer.set_packed("weight", for_kernels(codes))
        # pyrefly: ignore[bad-assignment]  (the annotation of nn.Linear has no None)
        layer.bias = None if bias is None else nn.Parameter(bias.detach())
        return layer


class D2QuantExperts(_Codes, PackedExperts):
    """
    Stands in for a fused experts module of transformers, with one or both of its weights packed as in
    [`D2QuantLinear`]: `(experts, out, layout.row_bytes)`, and `down_proj_column` `(experts, in)` where column scales
    are kept.
    """
