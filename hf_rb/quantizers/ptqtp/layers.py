"""The linear layer and the fused experts whose weights are trit-planes."""

from hf_rb.quantizers.packed.experts import PackedExperts
from hf_rb.quantizers.packed.linear import PackedLinear, PackedModule


__all__ = ["PTQTPExperts", "PTQTPLinear"]


class _Planes(PackedModule):
    def described(self, name: str) -> str:
        return f"planes={self.layouts[name].num_scales}"


class PTQTPLinear(_Planes, PackedLinear):
    """
    A linear layer whose weight is stored as trit-planes.

    `weight` is a frozen uint8 parameter `(out_features, layout.row_bytes)` in the kernels' layout, `weight_scale` a
    frozen float16 parameter `(out_features, ceil(in_features / group_size), planes)`; gradients flow to the input and
    the bias.
    """


class PTQTPExperts(_Planes, PackedExperts):
    """
    Stands in for a fused experts module of transformers, with one or both of its weights stored as trit-planes.

    A packed projection is uint8 `(experts, out, layout.row_bytes)`, with float16 scales
    `(experts, out, groups, planes)`.
    """
