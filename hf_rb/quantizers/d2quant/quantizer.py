"""D²Quant as a quantization backend of `from_pretrained(..., quantization_config=D2QuantConfig(...))`."""

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_rb.io.texts import check_columns
from hf_rb.quantizers.d2quant.biases import BIAS_SWITCH, add_biases, biases_by_switch, set_bias
from hf_rb.quantizers.d2quant.config import D2QuantConfig
from hf_rb.quantizers.d2quant.format import Coding, code_bits, for_kernels, from_file, is_dual, layout_of, to_file
from hf_rb.quantizers.d2quant.layers import D2QuantExperts, D2QuantLinear
from hf_rb.quantizers.d2quant.maths import absorption, dsq, grids
from hf_rb.quantizers.d2quant.streaming import ColumnScales
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.loading.matrices import Place, Solved
from hf_rb.quantizers.loading.quantizer import PackingQuantizer
from hf_rb.quantizers.packed.layer_kinds import LINEAR
from hf_rb.quantizers.packed.linear import PackedModule
from hf_rb.quantizers.packed.weight import PackedWeight


__all__ = ["D2QuantQuantizer"]

logger = logging.get_logger(__name__)


class D2QuantQuantizer(PackingQuantizer):
    """
    Quantizes a model to 2, 3 or 4 bits, or loads one that is quantized already.

    With `backend="rtn"` weights are rounded one by one while they load. With `"gptq"` and `"gptaq"` the model is
    loaded as it is and quantized on calibration text afterwards, in memory.

    Attributes:
        codings (`dict[str, Coding]`): How the weights are coded that are quantized, by the full name of the layer, or
            of the parameter of fused experts.
    """

    beside = ("scale", "zero", "hi", "column")
    linear_class, experts_class = D2QuantLinear, D2QuantExperts
    quantization_config: D2QuantConfig  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(self, quantization_config: D2QuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.codings: dict[str, Coding] = {}
        self.calibrates = not self.pre_quantized and quantization_config.calibrated
        if self.calibrates and isinstance(quantization_config.dataset, str):
            check_columns(quantization_config.dataset)

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        if self.calibrates and isinstance(self.quantization_config.bits_per_layer, str):  # which reads all weights
            from hf_rb.quantizers.d2quant.calibrate.checks import check_model

            check_model(model, self.quantization_config)
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.downs = set(absorption.down_projections(model))
        if self.calibrates:
            for name, module, weights in self.choose(model):
                fulls = [name] if isinstance(module, LINEAR) else [f"{name}.{weight}" for weight in weights]
                self.codings |= {full: self._coding(full, self.units(full, name)) for full in fulls}
            from hf_rb.quantizers.d2quant.calibrate.checks import check_layers, check_model

            check_layers(model, self.codings)
            check_model(model, self.quantization_config)
            return model
        super()._process_model_before_weight_loading(model, **kwargs)
        self.biased = [name for name, module in model.named_modules() if self._misses_bias(name, module)]
        add_biases(model, self.biased)
        return model

    def layout_of(self, name: str, in_features: int, units: int) -> Layout:
        coding = self.codings[name] = self._coding(name, units)
        return layout_of(in_features, self.quantization_config.group_size, *coding)

    def has_column(self, name: str, layout: Layout) -> bool:
        return is_dual(layout) and (not self.pre_quantized or self._keeps_column(name))

    def adds_bias(self, name: str) -> bool:
        return _among(name, self.quantization_config.bias_modules)

    def _coding(self, name: str, bits: int) -> Coding:
        return Coding(bits, self.quantization_config.dsq and bits < 4 and name in self.downs)

    def _keeps_column(self, name: str) -> bool:
        return _among(name, self.quantization_config.column_modules)

    def _misses_bias(self, name: str, module: nn.Module) -> bool:
        return not isinstance(module, PackedModule) and self.adds_bias(name) and getattr(module, "bias", None) is None

    def solve(self, layout: Layout, matrix: Tensor) -> Solved:
        config, bits = self.quantization_config, code_bits(layout)
        if is_dual(layout):
            codes = dsq.round_to_nearest(matrix, bits, config.group_size, config.dsq_iters)
        else:
            codes = grids.round_to_nearest(matrix, bits, config.group_size, config.clip_search)
        matrix = matrix.float()
        norm = matrix.norm()
        error = ((codes.dequantize() - matrix).norm() / norm).item() if norm else 0.0
        return Solved(for_kernels(codes), error, resolved=False)

    def to_file(self, layout: Layout, weight: PackedWeight) -> PackedWeight:
        return to_file(layout, weight)

    def from_file(self, layout: Layout, stored: PackedWeight, parameter: str) -> PackedWeight:
        return from_file(layout, stored, is_dual(layout) and self._keeps_column(parameter.removesuffix(".weight")))

    def prepare_streaming(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        if self.calibrates:
            raise ValueError(
                f"`backend={config.backend!r}` runs the model on text, so it cannot be streamed: leave out "
                "`stream=True` (`--stream`), or quantize with `backend='rtn'`, which needs no data."
            )
        self.columns = ColumnScales(model, self.layouts, lambda layout, matrix: self.solve(layout, matrix).weight)
        dual = [name for name, coding in self.codings.items() if coding.dual]
        config.column_modules = [name for name in dual if name not in self.columns.absorbed] or None

    def streams(self, model: PreTrainedModel, name: str) -> bool:
        return super().streams(model, name) or self.columns.has_partner(name.removesuffix(".bias"))

    def quantize_tensor(self, parameter: str, module: PackedModule, matrix: Tensor, place: Place) -> PackedWeight:
        name, attribute = parameter.removesuffix(".weight"), parameter.rpartition(".")[2]
        layout, weight = module.layouts[attribute], self.quantize_matrix(parameter, module, matrix)
        if weight.column is not None and not self._keeps_column(name):
            self.columns.take(name, weight.column, place)
            weight.column = None
        elif self.columns.has_partner(name):
            self.columns.put_into(name, layout, weight.scale, getattr(module, attribute).shape[-2], place)
        return self.to_file(layout, weight)

    def scale_bias(self, parameter: str, bias: Tensor, place: Place) -> Tensor:
        return self.columns.scale_bias(parameter.removesuffix(".bias"), bias, place)

    def make_room(self, source: Any, config: PreTrainedConfig, stored: Container[str], packed: set[str]) -> set[str]:
        if not (biased := self.quantization_config.bias_modules or []):
            return set()
        places = biases_by_switch(config, biased)
        empty = {name for name in places if f"{name}.bias" not in stored}
        if not places or not empty <= packed:
            only_final = not places and biases_by_switch(config, biased[:-1])
            remedy = "dac_final=False" if only_final else "dac=False"
            raise ValueError(
                f"{source} keeps corrections as biases of {len(biased)} modules ({biased[-1]}, …), for which an "
                f"ordinary {config.model_type} has no place. Load it with "
                "`quantization_config=D2QuantConfig(backend='rtn', dequantize=True)`, which keeps them in memory, or "
                f"quantize with `{remedy}`."
            )
        setattr(config, BIAS_SWITCH, True)
        return empty

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self.calibrates:
            from hf_rb.quantizers.d2quant.calibrate.pipeline import quantize_model  # what it needs, loading does not

            quantize_model(model, config, self.codings, self.report)
            conversions: Any = model._weight_conversions
            self.plain_conversions = conversions
            return model
        for name in self.biased:
            bias = model.get_submodule(name).bias
            if not (bias.is_meta or getattr(bias, "_is_hf_initialized", False)):
                self.arrivals.missing.add(f"{name}.bias")
        super()._process_model_after_weight_loading(model, **kwargs)
        if not self.pre_quantized:
            config.column_modules = absorption.absorb(model) or None
        elif config.dequantize:
            self._make_room(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        super()._dequantize(model, dtype)
        self._make_room(model)
        return model

    def _make_room(self, model: PreTrainedModel) -> None:
        """Makes an ordinary model one of an architecture with biases where its corrections are, or warns that there is
        none.
        """
        if not (biased := self.quantization_config.bias_modules):
            return
        places = biases_by_switch(model.config, biased)
        if not places:
            logger.warning(
                f"The corrections of this model stay in biases of {len(biased)} modules ({biased[0]}, …). What "
                f"`save_pretrained` writes now has them, but an ordinary {type(model).__name__} leaves them out when "
                "it is loaded."
            )
            return
        setattr(model.config, BIAS_SWITCH, True)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module.bias is None and _among(name, places):
                set_bias(module, torch.zeros(module.out_features))


def _among(name: str, names: Iterable[str] | None) -> bool:
    # A model with a head and one without differ in a prefix.
    return any(f".{one}".endswith(f".{name}") or f".{name}".endswith(f".{one}") for one in names or ())
