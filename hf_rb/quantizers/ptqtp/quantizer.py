"""PTQTP as a quantization backend of `from_pretrained(..., quantization_config=PTQTPConfig())`."""

import time

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_rb import _compat
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.linear import PTQTPLinear
from hf_rb.quantizers.ptqtp.packing import TritPlanes, dequantize, row_blocks
from hf_rb.quantizers.ptqtp.solver import fit_scales, search_trits
from hf_rb.quantizers.report import LayerReport, Report


__all__ = ["PTQTPQuantizer"]

logger = logging.get_logger(__name__)

QK = ["q_proj", "k_proj"]


class PTQTPQuantizer(HfQuantizer):
    """
    Quantizes a model while it loads, or loads one that is quantized already.

    Attributes:
        report ([`~hf_rb.quantizers.Report`]):
            After quantizing: error, solver statistics and what was skipped. The model keeps it as
            `model.hf_quantizer.report`.
    """

    requires_calibration = False
    serialized_names = {"weight": ["weight", "weight_scale"]}
    quantization_config: PTQTPConfig

    def __init__(self, quantization_config: PTQTPConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.report = Report(method="ptqtp")
        self.failures: list[str] = []
        if quantization_config.dequantize and not self.pre_quantized:
            raise ValueError(
                "`dequantize=True` is for loading a PTQTP checkpoint, and this one is not quantized. Quantize it first "
                "and call `model.dequantize()`, or leave `dequantize` out."
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        module, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name == "weight" and isinstance(model.get_submodule(module), PTQTPLinear)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        config = self.quantization_config
        if config.dequantize:
            return model
        names = [name for name, _ in model.named_modules()]
        patterns = [*(config.modules_to_not_convert or []), *([] if config.quantize_qk else QK)]
        if not self.pre_quantized:
            _check_patterns(config, patterns, names, type(model).__name__)
        skip = self.get_modules_to_not_convert(model, patterns, model._keep_in_fp32_modules, add_default_skips=True)
        self._mention_experts(model)
        found = False
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            # A subclass computes something else.
            if type(module) is not nn.Linear or not _compat.should_convert_module(name, skip):
                self.report.skipped.append(name)
                continue
            found = True
            model.set_submodule(name, self._empty_layer(name, module))
        if not found:
            raise ValueError(
                f"There is no `nn.Linear` to quantize in {type(model).__name__}: {len(names)} modules seen."
            )
        return model

    def _empty_layer(self, name: str, linear: nn.Linear) -> PTQTPLinear:
        config = self.quantization_config
        per_layer = (config.planes_per_layer or {}).items()
        planes = next((planes for pattern, planes in per_layer if _matches(pattern, name)), config.planes)
        bias = linear.bias is not None
        dtype = linear.weight.dtype
        return PTQTPLinear(linear.in_features, linear.out_features, bias, config, planes, linear.weight.device, dtype)

    def _mention_experts(self, model: nn.Module) -> None:
        experts = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "expert" in name]
        self.report.skipped += experts
        if experts and not self.pre_quantized:
            share = sum(model.get_parameter(name).numel() for name in experts)
            logger.warning(
                f"PTQTP leaves the {share / 1e6:.1f}M weights of the fused experts in {type(model).__name__} as they are: "
                "it quantizes `nn.Linear` layers."
            )

    def get_quantize_ops(self) -> "_Quantize":
        return _Quantize(self)

    def get_load_operations(self) -> dict:
        return {"dequantize": _Dequantize} if self.quantization_config.dequantize else {}

    def quantize_weight(self, name: str, layer: PTQTPLinear, weight: Tensor) -> dict[str, Tensor]:
        """Returns the packed tensors of a weight `(out_features, in_features)`, and adds its layer to the report."""
        config, start = self.quantization_config, time.perf_counter()
        options = config.max_iter, config.tol, config.tol_mode, config.scale_mode
        scales, resolved = fit_scales(weight, config.group_size, layer.planes, *options)
        packed, change, norm = [], 0.0, 0.0
        for rows in row_blocks(*weight.shape):
            trits = search_trits(weight[rows], scales[rows], config.group_size)
            planes = TritPlanes(trits, scales[rows], config.group_size)
            packed.append(planes.pack(config.packing)["weight"])
            original = weight[rows].float()
            change += (planes.dequantize() - original).square().sum(dtype=torch.float64).item()
            norm += original.square().sum(dtype=torch.float64).item()
        seconds = time.perf_counter() - start
        error = (change / norm) ** 0.5 if norm else 0.0
        self.report.add(LayerReport(name, weight.numel(), error, resolved), seconds)
        return {"weight": torch.cat(packed), "weight_scale": scales}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        if self.failures:
            raise ValueError("\n".join(self.failures))
        for module in model.modules():
            if isinstance(module, PTQTPLinear):
                module.weight_scale.requires_grad_(False)  # the loader trains whatever is floating
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # saving turns config.dtype into a string
        for name, module in list(model.named_modules()):
            if isinstance(module, PTQTPLinear):
                linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                linear.weight = nn.Parameter(module.dequantize(dtype))
                linear.bias = module.bias
                model.set_submodule(name, linear)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(_compat.ConversionOps):
    """A checkpoint's `weight` -> `weight`, `weight_scale` of a [`PTQTPLinear`]."""

    def __init__(self, quantizer: PTQTPQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict, *, full_layer_name: str, model: nn.Module, **kwargs) -> dict[str, Tensor]:
        ((weight,),) = ([value] if isinstance(value, Tensor) else value for value in input_dict.values())
        name = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(name)
        try:
            if weight.shape != (layer.out_features, layer.in_features):
                expected = (layer.out_features, layer.in_features)
                raise ValueError(f"The checkpoint's weight has shape {tuple(weight.shape)}, expected {expected}.")
            tensors = self.quantizer.quantize_weight(name, layer, weight)
        except ValueError as error:
            # Raised here it would end up in a table of the log. It is raised when the last tensor has been seen.
            self.quantizer.failures.append(f"{full_layer_name}: {error}")
            tensors = {key: torch.zeros_like(getattr(layer, key), device="cpu") for key in ("weight", "weight_scale")}
        return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


class _Dequantize(_compat.ConversionOps):
    """`weight`, `weight_scale` of a checkpoint -> the `weight` of an `nn.Linear`; other weights pass."""

    def __init__(self, hf_quantizer: PTQTPQuantizer):
        self.hf_quantizer = hf_quantizer  # the name by which the loader knows not to cast what comes in

    def convert(self, input_dict: dict, *, full_layer_name: str, model: nn.Module, **kwargs) -> dict[str, Tensor]:
        target = model.get_parameter_or_buffer(full_layer_name)
        if "weight_scale" in input_dict:
            tensors = {name: tensor for name, (tensor,) in input_dict.items()}
            config = self.hf_quantizer.quantization_config
            return {full_layer_name: dequantize(tensors, config, target.shape[1], target.dtype)}
        if "weight" in input_dict:
            return {full_layer_name: input_dict["weight"][0].to(target.dtype)}
        # A conversion of the model's own goes on from here, such as the merge of experts.
        return {key: [tensor.to(target.dtype) for tensor in tensors] for key, tensors in input_dict.items()}

    @property
    def reverse_op(self):
        return _compat.IdentityOp()


def _matches(pattern: str, name: str) -> bool:
    return not _compat.should_convert_module(name, [pattern])


def _check_patterns(config: PTQTPConfig, patterns: list[str], names: list[str], model: str) -> None:
    for pattern in [*patterns, *(config.planes_per_layer or {})]:
        if any(_matches(pattern, name) for name in names):
            continue
        if pattern in QK:
            raise ValueError(
                f"quantize_qk=False: {model} has no {pattern}. Name the projections to keep in `modules_to_not_convert`."
            )
        endings = sorted({name.rpartition(".")[2] for name in names} - {""})
        raise ValueError(f"{pattern!r} matches no module of {model}; names end in {', '.join(endings)}.")
