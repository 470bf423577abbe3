"""PTQTP as a quantization backend of `from_pretrained(..., quantization_config=PTQTPConfig())`."""

from dataclasses import replace

from torch import Tensor, nn

from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.loading.quantizer import PackingQuantizer, Solved
from hf_rb.quantizers.loading.selection import setting
from hf_rb.quantizers.packed.layer_kinds import LINEAR, features
from hf_rb.quantizers.packed.linear import PackedModule
from hf_rb.quantizers.packed.weight import DamagedTensor, PackedWeight
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.format import check_scales, repack
from hf_rb.quantizers.ptqtp.layers import PTQTPExperts, PTQTPLinear
from hf_rb.quantizers.ptqtp.solver import quantize_matrix


__all__ = ["PTQTPQuantizer"]


class PTQTPQuantizer(PackingQuantizer):
    """Quantizes a model to trit-planes while it loads, or loads one that is quantized already."""

    per_layer = "planes_per_layer"
    quantization_config: PTQTPConfig  # pyrefly: ignore[bad-override-mutable-attribute]

    def pack_module(self, name: str, module: nn.Module, weights: list[str]) -> PackedModule:
        config = self.quantization_config
        if not isinstance(module, LINEAR):
            planes = {weight: self._planes(f"{name}.{weight}", name) for weight in weights}
            return PTQTPExperts(module, config, planes)
        size, weight = (*features(module), module.bias is not None), module.weight
        return PTQTPLinear(*size, config, self._planes(name), weight.device, weight.dtype).stand_in_for(module)

    def _planes(self, *names: str) -> int:
        # pyrefly: ignore[bad-argument-type]  (a strategy is a dictionary by now)
        return setting(self.quantization_config.planes_per_layer, self.quantization_config.planes, *names)

    def solve(self, layout: Layout, matrix: Tensor) -> Solved:
        config = self.quantization_config
        packed, scale, error, resolved = quantize_matrix(
            matrix,
            group_size=layout.group_size,
            planes=layout.num_scales,
            max_iter=config.max_iter,
            tol=config.tol,
            tol_mode=config.tol_mode,
            scale_mode=config.scale_mode,
            multistart=config.multistart,
        )
        return Solved(PackedWeight(packed, scale), error, resolved)

    def to_file(self, layout: Layout, weight: PackedWeight) -> PackedWeight:
        return replace(weight, packed=repack(weight.packed, layout, "nibble", self.quantization_config.packing))

    def from_file(self, layout: Layout, stored: PackedWeight, parameter: str) -> PackedWeight:
        try:
            check_scales(stored.scale, (*stored.packed.shape[:-1], layout.groups, layout.num_scales))
        except ValueError as error:
            raise DamagedTensor(str(error), "scale") from error
        return PackedWeight(repack(stored.packed, layout, self.quantization_config.packing, "nibble"), stored.scale)
