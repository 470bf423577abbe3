"""PTQTP as a quantization backend of `from_pretrained(..., quantization_config=PTQTPConfig())`.

A layer holds the bytes that the kernels read. A file has those of `config.packing`, in the names and the splitting of the
model's own checkpoints: `experts.3.gate_proj.weight`, with its scales as `experts.3.gate_proj.weight_scale`. Loading and
`save_pretrained` go from one to the other; a state dict is what is in memory.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from hf_rb import _compat, _registration
from hf_rb.quantizers import kernels
from hf_rb.quantizers.baseline import rtn
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.conversion import Conversions
from hf_rb.quantizers.ptqtp.linear import PackedModule
from hf_rb.quantizers.ptqtp.packing import check_scales, packed_width, repack
from hf_rb.quantizers.ptqtp.selection import packable
from hf_rb.quantizers.ptqtp.solver import quantize_matrix
from hf_rb.quantizers.report import LayerReport, Report


__all__ = ["PTQTPQuantizer"]


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
        self.layouts: dict[str, Layout] = {}  # by the full name of a packed parameter
        self.missing: set[str] = set()
        if quantization_config.dequantize and not self.pre_quantized:
            raise ValueError(
                "`dequantize=True` is for loading a PTQTP checkpoint, and this one is not quantized. Quantize it first "
                "and call `model.dequantize()`, or leave `dequantize` out."
            )

    # What is quantized.

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "PTQTP layers cannot be split over devices: leave out `distributed_config` and `tp_plan`."
            )
        for name, module in list(packable(model, self)):
            self.layouts |= {f"{name}.{parameter}": layout for parameter, layout in module.layouts.items()}
            if not self.quantization_config.dequantize:
                module._is_hf_initialized = True  # bytes cannot be initialized; what is missing is reported
                model.set_submodule(name, module)
        if not self.layouts:
            seen = sum(1 for _ in model.modules())
            raise ValueError(f"There is no `nn.Linear` to quantize in {type(model).__name__}: {seen} modules seen.")
        self.missing = set(self.layouts)
        if self.pre_quantized:
            self.missing |= {f"{name}_scale" for name in self.layouts}
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        module, name = _owner(model, param_name)
        return not self.pre_quantized and name in getattr(module, "layouts", ())

    def quantize_tensor(self, parameter: str, module: PackedModule, matrix: Tensor) -> dict[str, Tensor]:
        """
        Quantizes a weight matrix for a file and adds it to the report.

        Args:
            parameter (`str`):
                Name of the packed parameter in the model.
            module ([`PTQTPLinear`] or [`PTQTPExperts`]):
                Module that has the parameter.
            matrix (`torch.Tensor`):
                Weights `(out, in)` of the layer or of one expert, or of one half of an expert's `gate_up_proj`.

        Returns:
            `dict[str, torch.Tensor]`: The packed bytes under `""` and the scales under `"_scale"`: what follows the name of
            the parameter.

        Raises:
            ValueError: The matrix has a NaN, an infinite value or another width.
        """
        packed, scale = self._solve(parameter, module, matrix)
        layout = module.layouts[parameter.rpartition(".")[2]]
        return {"": repack(packed, layout, "nibble", self.quantization_config.packing), "_scale": scale}

    def _solve(self, parameter: str, module: PackedModule, matrix: Tensor) -> tuple[Tensor, Tensor]:
        config, weight = self.quantization_config, parameter.rpartition(".")[2]
        layout = module.layouts[weight]
        if matrix.shape[-1] != layout.in_features:
            raise ValueError(f"The weight has {matrix.shape[-1]} columns, expected {layout.in_features}.")

        def solve(block: Tensor) -> tuple[Tensor, Tensor]:
            start = time.perf_counter()
            packed, scale, error, resolved = quantize_matrix(
                block,
                group_size=layout.group_size,
                planes=layout.num_scales,
                max_iter=config.max_iter,
                tol=config.tol,
                tol_mode=config.tol_mode,
                scale_mode=config.scale_mode,
                multistart=config.multistart,
            )
            seconds = time.perf_counter() - start
            name = parameter.removesuffix(".weight")
            self.report.add(LayerReport(name, block.numel(), error, resolved, *rtn(block)), seconds)
            return packed, scale

        return _by_block(module, weight, matrix, solve)

    # How tensors of a file become parameters, and back.

    def get_quantize_ops(self) -> _compat.ConversionOps:
        return _compat.IdentityOp()  # the conversion has done it

    def get_new_dtype(self, converter, param, dtype: torch.dtype | None) -> torch.dtype | None:
        # No cast into bytes nor into scales: a tensor of another type is refused, as it is with `dequantize=True`.
        scales = all(pattern.endswith("_scale") for pattern in converter.target_patterns)
        packed = dtype is not None and (not dtype.is_floating_point or scales)
        return None if packed else super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        self.conversions = Conversions(self, weight_conversions)
        return self.conversions.loading

    def packs(self, model: nn.Module, name: str) -> bool:
        """Whether a parameter is packed, or the scales of one that is."""
        module, parameter = _owner(model, name)
        return parameter.removesuffix("_scale") in getattr(module, "layouts", ())

    def load(self, model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Returns the parameters that a tensor of a checkpoint makes, the parameter `name` among them."""
        module, parameter = _owner(model, name)
        weight = parameter.removesuffix("_scale")
        if not self.packs(model, name):
            return {name: tensor}
        layout, shape = module.layouts[weight], getattr(module, parameter).shape
        if parameter != weight:
            check_scales(tensor, shape)
            self.missing.discard(name)
            return {name: tensor}
        packing, columns = self.quantization_config.packing, layout.in_features
        if self.pre_quantized:
            columns = packed_width(columns, layout.group_size, layout.num_scales, packing)
        expected = (*shape[:-1], columns)
        if tensor.ndim == 3 and not self.pre_quantized and (module.is_transposed or tensor.shape != expected):
            tensor = tensor.mT
        if tensor.shape != expected:
            raise ValueError(f"The checkpoint's weight has shape {tuple(tensor.shape)}, expected {expected}.")
        matrices = []
        for i, matrix in enumerate(tensor if tensor.ndim == 3 else [tensor]):
            try:
                if self.pre_quantized:
                    matrices.append(
                        _by_block(module, weight, matrix, lambda block: (repack(block, layout, packing, "nibble"),))
                    )
                else:
                    matrices.append(self._solve(name, module, matrix))
            except (ValueError, MemoryError) as error:
                raise ValueError(f"expert {i}: {error}" if tensor.ndim == 3 else str(error)) from error
        made = [torch.stack(parts) if tensor.ndim == 3 else parts[0] for parts in zip(*matrices, strict=True)]
        result = dict(zip((name, f"{name}_scale"), made, strict=False))
        self.missing -= result.keys()
        return result

    def unpack(self, name: str, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the weights of a packed tensor of a checkpoint that goes into the parameter `name`."""
        layout = self.layouts[name]
        check_scales(scale, (*weight.shape[:-1], layout.groups, layout.num_scales))
        packed = repack(weight, layout, self.quantization_config.packing, "nibble")
        return kernels.dequantize(packed, scale, layout, dtype)

    def fail(self, model: nn.Module, name: str, error: Exception) -> dict[str, Tensor]:
        """Remembers why a parameter could not be made, and returns something of its shape."""
        # Raised in a conversion it would end up in a table of the log. It is raised when the last tensor has been seen.
        self.failures.append(f"{name}: {error}")
        both = not self.pre_quantized and self.packs(model, name)
        names = [name, f"{name}_scale"] if both else [name]
        self.missing -= {name, f"{name}_scale"}
        return {name: torch.zeros_like(model.get_parameter_or_buffer(name), device="cpu") for name in names}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        packed = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, PackedModule)]
        for prefix, module in packed:
            for name, parameter in module.named_parameters(recurse=False):
                loaded = parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)
                if not loaded and not self.packs(model, f"{prefix}.{name}"):
                    self.missing.add(f"{prefix}.{name}")
        self.failures += [f"{name}: not in the checkpoint." for name in sorted(self.missing)]
        if self.failures:
            raise ValueError("\n".join(self.failures))
        for _, module in packed:
            for name in module.layouts:
                getattr(module, f"{name}_scale").requires_grad_(False)  # the loader trains whatever is floating
        used = model._weight_conversions
        self.plain_conversions = self.conversions.plain(used)
        dequantized = self.quantization_config.dequantize
        model._weight_conversions = self.plain_conversions if dequantized else self.conversions.packed(used)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
        for module in modules.values():
            module.restore_scales()
        state = model.state_dict()
        for prefix, module in modules.items():
            for parameter, layout in module.layouts.items():
                name = f"{prefix}.{parameter}"
                weight = _compat.load_offloaded_parameter(model, name) if state[name].is_meta else state[name]
                state[name] = repack(weight, layout, "nibble", self.quantization_config.packing)
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # saving turns config.dtype into a string
        packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedModule)]
        for name, module in packed:
            if any(parameter.is_meta for parameter in module.parameters()):
                raise ValueError(
                    f"{name} is offloaded, so it cannot be dequantized in place. Load the checkpoint with "
                    "`quantization_config=PTQTPConfig(dequantize=True)` instead."
                )
        for name, module in packed:
            plain = module.plain(dtype)
            # Below an adapter what was frozen stays frozen.
            plain.requires_grad_(not name.endswith(".base_layer"))
            model.set_submodule(name, plain)
        model._weight_conversions = self.plain_conversions
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        _registration.require("peft")  # without our guards a merge could damage packed weights
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _by_block(module: PackedModule, name: str, matrix: Tensor, function: Callable) -> tuple[Tensor, ...]:
    # Most checkpoints have gate and up apart: what comes out does not depend on that, and messages name the one.
    joined = name == "gate_up_proj" and module.is_concatenated and len(matrix) == getattr(module, name).shape[-2]
    results = []
    for block, half in zip(matrix.chunk(2) if joined else [matrix], ("gate_proj", "up_proj"), strict=False):
        try:
            results.append(function(block))
        except (ValueError, MemoryError) as error:
            raise ValueError(f"{half}: {error}" if joined else str(error)) from error
    return tuple(torch.cat(parts) if joined else parts[0] for parts in zip(*results, strict=True))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, parameter = name.rpartition(".")
    return model.get_submodule(module), parameter
