"""D²Quant as a quantization backend of `from_pretrained(..., quantization_config=D2QuantConfig(...))`."""

from collections.abc import Iterable

from torch import Tensor, nn

from hf_rb.quantizers.backend import PackingQuantizer
from hf_rb.quantizers.d2quant import absorption, dsq, grids
from hf_rb.quantizers.d2quant.biases import add_biases
from hf_rb.quantizers.d2quant.config import D2QuantConfig
from hf_rb.quantizers.d2quant.experts import D2QuantExperts
from hf_rb.quantizers.d2quant.linear import D2QuantLinear
from hf_rb.quantizers.d2quant.packing import code_bits, for_kernels, from_file, is_dual, layout_of, to_file
from hf_rb.quantizers.experts import input_size
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.packed import PackedModule
from hf_rb.quantizers.selection import packable, setting


__all__ = ["D2QuantQuantizer"]


class D2QuantQuantizer(PackingQuantizer):
    """
    Quantizes a model to 2, 3 or 4 bits, or loads one that is quantized already.

    With `backend="rtn"` weights are rounded one by one while they load. With `"gptq"` and `"gptaq"` the model is loaded as it is
    and quantized on calibration text afterwards, in memory.

    Attributes:
        packable (`dict[str, tuple[int, bool]]`): Full names of the weights that are quantized (of the layer, or of the parameter
            of fused experts), with their bits and whether they get dual scales.
    """

    serialized_names = {"weight": ["weight", "weight_scale", "weight_zero", "weight_hi", "weight_column"]}
    suffixes = ("_scale", "_zero", "_hi", "_column")
    per_layer = "bits_per_layer"
    quantization_config: D2QuantConfig

    def __init__(self, quantization_config: D2QuantConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.packable: dict[str, tuple[int, bool]] = {}
        self.calibrates = not self.pre_quantized and quantization_config.backend != "rtn"

    # What is quantized.

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        self.downs = set(absorption.down_projections(model))
        if self.calibrates:
            for name, module, weights in packable(model, self):
                self._plan(name, module, weights)
            if not self.packable:
                raise ValueError(f"There is no `nn.Linear` to quantize in {type(model).__name__}.")
            return model
        model = super()._process_model_before_weight_loading(model, **kwargs)
        self.biased = [name for name, module in model.named_modules() if self._adds_bias(name, module)]
        add_biases(model, self.biased)
        return model

    def pack_module(self, name: str, module: nn.Module, weights: list[str]) -> PackedModule:
        layouts, columns = {}, []
        for weight, (bits, dual) in self._plan(name, module, weights).items():
            linear = isinstance(module, nn.Linear)
            width = module.in_features if linear else input_size(module, weight)
            layouts[weight] = layout_of(width, self.quantization_config.group_size, bits, dual)
            if dual and (not self.pre_quantized or self._keeps_column(name if linear else f"{name}.{weight}")):
                columns.append(weight)
        if not linear:
            return D2QuantExperts(module, layouts, columns=tuple(columns))
        bias = module.bias is not None or _among(name, self.quantization_config.bias_modules)
        return D2QuantLinear(
            module.in_features,
            module.out_features,
            bias,
            layouts["weight"],
            column=bool(columns),
            device=module.weight.device,
            dtype=module.weight.dtype,
        )

    def _plan(self, name: str, module: nn.Module, weights: list[str]) -> dict[str, tuple[int, bool]]:
        config, plan = self.quantization_config, {}
        for weight in weights:
            full = name if isinstance(module, nn.Linear) else f"{name}.{weight}"
            bits = setting(config.bits_per_layer, config.bits, full, name)
            plan[weight] = self.packable[full] = bits, config.dsq and bits < 4 and full in self.downs
        return plan

    def _keeps_column(self, name: str) -> bool:
        return _among(name, self.quantization_config.column_modules)

    def _adds_bias(self, name: str, module: nn.Module) -> bool:
        listed = not isinstance(module, PackedModule) and _among(name, self.quantization_config.bias_modules)
        return listed and getattr(module, "bias", None) is None

    def solve(self, layout: Layout, matrix: Tensor) -> tuple[dict[str, Tensor], float, bool]:
        config, bits = self.quantization_config, code_bits(layout)
        if is_dual(layout):
            codes = dsq.round_to_nearest(matrix, bits, config.group_size, config.dsq_iters)
        else:
            codes = grids.round_to_nearest(matrix, bits, config.group_size, config.clip_search)
        matrix = matrix.float()
        norm = matrix.norm()
        error = ((codes.dequantize() - matrix).norm() / norm).item() if norm else 0.0
        return for_kernels(codes), error, False

    # Files.

    def to_file(self, layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return to_file(layout, tensors)

    def from_file(self, layout: Layout, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        return from_file(layout, tensors, is_dual(layout) and self._keeps_column(name.removesuffix(".weight")))

    # After loading.

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        config = self.quantization_config
        if self.calibrates:
            from hf_rb.quantizers.d2quant.pipeline import quantize_model  # what it needs, loading does not

            quantize_model(model, config, self.packable, self.report)
            self.plain_conversions = model._weight_conversions
            return model
        for name in self.biased:
            bias = model.get_submodule(name).bias
            if not (bias.is_meta or getattr(bias, "_is_hf_initialized", False)):
                self.missing.add(f"{name}.bias")
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if not self.pre_quantized:
            config.column_modules = absorption.absorb(model) or None
        return model


def _among(name: str, names: Iterable[str] | None) -> bool:
    # A model with a head and one without differ in a prefix.
    return any(f".{one}".endswith(f".{name}") or f".{name}".endswith(f".{one}") for one in names or ())
