"""D²Quant as a quantization backend of `from_pretrained(..., quantization_config=D2QuantConfig(...))`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_rb.io.texts import check_columns
from hf_rb.quantizers.d2quant.biases import BIAS_SWITCH, add_biases, biases_by_switch, set_bias
from hf_rb.quantizers.d2quant.config import D2QuantConfig
from hf_rb.quantizers.d2quant.experts import D2QuantExperts
from hf_rb.quantizers.d2quant.format import code_bits, for_kernels, from_file, is_dual, layout_of, scale_rows, to_file
from hf_rb.quantizers.d2quant.linear import D2QuantLinear
from hf_rb.quantizers.d2quant.maths import absorption, dsq, grids
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.loading.quantizer import PackingQuantizer
from hf_rb.quantizers.loading.selection import nothing_to_pack, packable, setting
from hf_rb.quantizers.packed.experts import input_size
from hf_rb.quantizers.packed.layer_kinds import LINEAR, features
from hf_rb.quantizers.packed.linear import PackedModule


if TYPE_CHECKING:
    from hf_rb.quantizers.folders.stream import Place

__all__ = ["D2QuantQuantizer"]

logger = logging.get_logger(__name__)


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
        if self.calibrates and isinstance(quantization_config.dataset, str):
            check_columns(quantization_config.dataset)

    # What is quantized.

    def preprocess_model(self, model: nn.Module, dtype: torch.dtype | None = None, **kwargs) -> None:
        if self.calibrates and isinstance(self.quantization_config.bits_per_layer, str):  # which reads all weights
            from hf_rb.quantizers.d2quant.calibrate.checks import check_model

            check_model(model, self.quantization_config)
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        self.downs = set(absorption.down_projections(model))
        if self.calibrates:
            for name, module, weights in packable(model, self):
                self._plan(name, module, weights)
            if not self.packable:
                raise ValueError(nothing_to_pack(model, self))
            from hf_rb.quantizers.d2quant.calibrate.checks import check_model, check_packable

            check_packable(model, self.packable)
            check_model(model, self.quantization_config)
            return model
        model = super()._process_model_before_weight_loading(model, **kwargs)
        self.biased = [name for name, module in model.named_modules() if self._adds_bias(name, module)]
        add_biases(model, self.biased)
        return model

    def pack_module(self, name: str, module: nn.Module, weights: list[str]) -> PackedModule:
        layouts, columns = {}, []
        for weight, (bits, dual) in self._plan(name, module, weights).items():
            linear = isinstance(module, LINEAR)
            width = features(module)[0] if linear else input_size(module, weight)
            layouts[weight] = layout_of(width, self.quantization_config.group_size, bits, dual)
            if dual and (not self.pre_quantized or self._keeps_column(name if linear else f"{name}.{weight}")):
                columns.append(weight)
        if not linear:
            return D2QuantExperts(module, layouts, columns=tuple(columns))
        bias = module.bias is not None or _among(name, self.quantization_config.bias_modules)
        packed = D2QuantLinear(
            *features(module),
            bias,
            layouts["weight"],
            column=bool(columns),
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        return packed.stand_in_for(module)

    def _plan(self, name: str, module: nn.Module, weights: list[str]) -> dict[str, tuple[int, bool]]:
        config, plan = self.quantization_config, {}
        for weight in weights:
            full = name if isinstance(module, LINEAR) else f"{name}.{weight}"
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

    # Tensor by tensor. The column scales of a down projection go into the scales of its partner without the model at hand: the
    # one that comes first solves the down projection.

    def prepare_streaming(self, model: nn.Module) -> None:
        config = self.quantization_config
        if self.calibrates:
            raise ValueError(
                f"`backend={config.backend!r}` runs the model on text, so it cannot be streamed: leave out `stream=True` "
                "(`--stream`), or quantize with `backend='rtn'`, which needs no data."
            )
        self.columns: dict[tuple[str, int | None], Tensor] = {}
        self.partners = {pair.up: pair for pair in absorption.absorbable(model)}
        absorbed = {pair.down for pair in self.partners.values()}
        dual = [name for name, (_, dual) in self.packable.items() if dual]
        config.column_modules = [name for name in dual if name not in absorbed] or None

    def streams(self, model: nn.Module, name: str) -> bool:
        return super().streams(model, name) or name.removesuffix(".bias") in self.partners

    def quantize_tensor(
        self, parameter: str, module: PackedModule, matrix: Tensor, place: "Place | None" = None
    ) -> dict[str, Tensor]:
        name = parameter.removesuffix(".weight").removesuffix(".bias")
        if matrix.ndim == 1:
            return {"": (matrix * self._column(self.partners[name].down, place)).to(matrix.dtype)}
        layout, tensors = module.layouts[parameter.rpartition(".")[2]], self._solve(parameter, module, matrix)
        if "_column" in tensors and not self._keeps_column(name):
            self.columns[name, place.expert] = tensors.pop("_column")
        elif name in self.partners:
            rows = range(place.first, place.first + len(matrix))
            wanted = range(*self.partners[name].rows.indices(getattr(module, parameter.rpartition(".")[2]).shape[-2]))
            here = [row - place.first for row in wanted if row in rows]
            if here:
                down = self.partners[name].down
                try:
                    tensors["_scale"][here] = scale_rows(layout, tensors["_scale"][here], self._column(down, place))
                except ValueError as error:
                    raise ValueError(
                        f"{error} Quantize without `stream=True` (`--stream`): then column scales stay with {down}."
                    ) from error
        return self.to_file(layout, tensors)

    def _column(self, down: str, place: "Place") -> Tensor:
        """Returns the column scales of a down projection, or of that of one expert."""
        if (down, place.expert) not in self.columns:
            parameter = down if down in self.layouts else f"{down}.weight"
            tensors, _, _ = self.solve(self.layouts[parameter], place.read(parameter))
            self.columns[down, place.expert] = tensors["_column"]
        return self.columns[down, place.expert]

    # After loading.

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        config = self.quantization_config
        if self.calibrates:
            from hf_rb.quantizers.d2quant.calibrate.pipeline import quantize_model  # what it needs, loading does not

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
        elif config.dequantize:
            self._make_room(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        model = super()._dequantize(model, dtype)
        self._make_room(model)
        return model

    def _make_room(self, model: nn.Module) -> None:
        """Makes an ordinary model one of an architecture with biases where its corrections are, or warns that there is none."""
        if not (biased := self.quantization_config.bias_modules):
            return
        places = biases_by_switch(model.config, biased)
        if not places:
            logger.warning(
                f"The corrections of this model stay in biases of {len(biased)} modules ({biased[0]}, …). What `save_pretrained` "
                f"writes now has them, but an ordinary {type(model).__name__} leaves them out when it is loaded."
            )
            return
        setattr(model.config, BIAS_SWITCH, True)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module.bias is None and _among(name, places):
                set_bias(module, torch.zeros(module.out_features))


def _among(name: str, names: Iterable[str] | None) -> bool:
    # A model with a head and one without differ in a prefix.
    return any(f".{one}".endswith(f".{name}") or f".{name}".endswith(f".{one}") for one in names or ())
