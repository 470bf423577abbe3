"""Fused experts of D²Quant."""

from hf_rb.quantizers.d2quant.linear import described
from hf_rb.quantizers.packed.experts import PackedExperts


__all__ = ["D2QuantExperts"]


class D2QuantExperts(PackedExperts):
    """
    Stands in for a fused experts module of transformers, with one or both of its weights packed as in [`D2QuantLinear`]:
    `(experts, out, layout.row_bytes)`, and `down_proj_column` `(experts, in)` where column scales are kept.
    """

    def extra_repr(self) -> str:
        stored = ", ".join(f"{name}: {described(self, name)}" for name in self.layouts)
        return f"{self.num_experts} of {self.experts_class.__name__}, {stored}"
