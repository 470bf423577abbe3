"""What the quantization backends of `from_pretrained(..., quantization_config=...)` have in common.

A layer holds the bytes that the kernels read. A file has the tensors of its method's format, in the names and the splitting of
the model's own checkpoints: `experts.3.gate_proj.weight`, with its scales as `experts.3.gate_proj.weight_scale`. Loading and
`save_pretrained` go from one to the other; a state dict is what is in memory.

The tensors of one weight are passed around as a dict by the suffix of their names: `""` are the packed bytes, `"_scale"` the
scales, and so on, of memory or of a file.
"""

import time
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from hf_rb.quantizers import kernels
from hf_rb.quantizers.allocation.allocate import allocate_layers
from hf_rb.quantizers.config import PackedConfig
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.loading.conversion import Conversions
from hf_rb.quantizers.loading.mpi import refuse_mpi
from hf_rb.quantizers.loading.selection import nothing_to_pack, packable
from hf_rb.quantizers.packed.baseline import rtn
from hf_rb.quantizers.packed.layer_kinds import is_transposed
from hf_rb.quantizers.packed.linear import PackedModule
from hf_rb.quantizers.packed.report import LayerReport, Report
from hf_rb.utils import compat
from hf_rb.utils.import_hooks import require


if TYPE_CHECKING:
    from hf_rb.quantizers.folders.stream import Place

__all__ = ["DamagedTensor", "PackingQuantizer"]

Tensors = dict[str, Tensor]


class DamagedTensor(ValueError):
    """Says what is wrong with a tensor of a file, whose name ends in `suffix`."""

    def __init__(self, message: str, suffix: str = ""):
        super().__init__(message)
        self.suffix = suffix


class PackingQuantizer(HfQuantizer):
    """
    Quantizes a model while it loads, or loads one that is quantized already.

    A method is a subclass that says how a weight is laid out ([`~PackingQuantizer.pack_module`]), how it is solved, and how
    the tensors of a file differ from those in memory.

    Attributes:
        suffixes (`tuple[str, ...]`): Suffixes of the tensors that a file may have beside the packed ones.
        per_layer (`str`): The field of the config that sets something for layers by name.
        report ([`~hf_rb.quantizers.Report`]):
            After quantizing: error, solver statistics and what was skipped. The model keeps it as
            `model.hf_quantizer.report`.
    """

    requires_calibration = False
    suffixes: tuple[str, ...] = ("_scale",)
    per_layer: str
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.report = Report(method=quantization_config.quant_method)
        self.failures: list[str] = []
        self.layouts: dict[str, Layout] = {}  # by the full name of a packed parameter
        self.missing: set[str] = set()
        self.checkpoint_files: list[str] | None = None
        self.unpacked: set[str] = set()  # layers that a file has packed and the model cannot have so
        if quantization_config.dequantize and not self.pre_quantized:
            raise ValueError(
                f"`dequantize=True` is for loading a {quantization_config.method} checkpoint, and this one is not quantized. "
                "Quantize it first and call `model.dequantize()`, or leave `dequantize` out."
            )

    # What a method is.

    @abstractmethod
    def pack_module(self, name: str, module: nn.Module, weights: list[str]) -> PackedModule:
        """Returns the stand-in for a linear layer or fused experts, some `weights` of which are packed."""

    @abstractmethod
    def solve(self, layout: Layout, matrix: Tensor) -> tuple[Tensors, float, bool]:
        """Returns what a matrix is in memory, its relative error, and whether it was solved a second time."""

    @abstractmethod
    def to_file(self, layout: Layout, tensors: Tensors) -> Tensors:
        """Returns what a file holds of a weight in memory."""

    @abstractmethod
    def from_file(self, layout: Layout, tensors: Tensors, name: str) -> Tensors:
        """Inverse of [`~PackingQuantizer.to_file`] for the parameter `name`, which checks every tensor: [`DamagedTensor`]."""

    # What is quantized.

    def preprocess_model(self, model: nn.Module, dtype: torch.dtype | None = None, **kwargs) -> None:
        self.checkpoint_files = kwargs.get("checkpoint_files")
        if not self.quantization_config.dequantize:
            refuse_mpi(model, self.checkpoint_files, self.quantization_config.method)
        strategy = getattr(self.quantization_config, self.per_layer)
        if isinstance(strategy, str):
            found = allocate_layers(self.per_layer, strategy, model, self.checkpoint_files)
            setattr(self.quantization_config, self.per_layer, {layer.name: layer.given for layer in found})
            self.report.allocation = found
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                f"{self.quantization_config.method} layers cannot be split over devices: leave out `distributed_config` and "
                "`tp_plan`."
            )
        for name, module, weights in list(packable(model, self)):
            packed = self.pack_module(name, module, weights)
            self.layouts |= {f"{name}.{parameter}": layout for parameter, layout in packed.layouts.items()}
            if self.pre_quantized:
                self.missing |= {
                    f"{name}.{weight}{suffix}" for weight in weights for suffix in ("", *packed.companions(weight))
                }
            if not self.quantization_config.dequantize and name not in self.unpacked:
                packed._is_hf_initialized = True  # bytes cannot be initialized; what is missing is reported
                model.set_submodule(name, packed)
        if not self.layouts:
            raise ValueError(nothing_to_pack(model, self))
        if not self.pre_quantized:
            self.missing = set(self.layouts)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        module, name = _owner(model, param_name)
        return not self.pre_quantized and name in getattr(module, "layouts", ())

    def prepare_streaming(self, model: nn.Module) -> None:
        """Is called with the model on the meta device before tensor after tensor is given to `quantize_tensor`."""

    def streams(self, model: nn.Module, name: str) -> bool:
        """Whether a parameter is given to `quantize_tensor`, in pieces as a file has them."""
        return self.param_needs_quantization(model, name)

    def quantize_tensor(
        self, parameter: str, module: PackedModule, matrix: Tensor, place: "Place | None" = None
    ) -> Tensors:
        """
        Quantizes a weight matrix for a file and adds it to the report.

        Args:
            parameter (`str`):
                Name of the packed parameter in the model.
            module ([`PackedModule`]):
                Module that has the parameter.
            matrix (`torch.Tensor`):
                Weights `(out, in)` of the layer or of one expert, or of one half of an expert's `gate_up_proj`.
            place ([`~hf_rb.quantizers.folders.stream.Place`], *optional*):
                Where in its parameter the matrix belongs, and a way to others.

        Returns:
            `dict[str, torch.Tensor]`: The stored tensors by what follows the name of the parameter: the packed bytes under
            `""`, the scales under `"_scale"`.

        Raises:
            ValueError: The matrix has a NaN, an infinite value or another width.
        """
        layout = module.layouts[parameter.rpartition(".")[2]]
        return self.to_file(layout, self._solve(parameter, module, matrix))

    def _solve(self, parameter: str, module: PackedModule, matrix: Tensor) -> Tensors:
        weight = parameter.rpartition(".")[2]
        layout = module.layouts[weight]
        if matrix.shape[-1] != layout.in_features:
            raise ValueError(f"The weight has {matrix.shape[-1]} columns, expected {layout.in_features}.")

        def solve(block: Tensor) -> Tensors:
            start = time.perf_counter()
            tensors, error, resolved = self.solve(layout, block)
            seconds = time.perf_counter() - start
            name = parameter.removesuffix(".weight")
            self.report.add(LayerReport(name, block.numel(), error, resolved, *rtn(block)), seconds)
            return tensors

        return _by_block(module, weight, matrix, solve)

    # How tensors of a file become parameters, and back.

    def get_quantize_ops(self) -> compat.ConversionOps:
        return compat.IdentityOp()  # the conversion has done it

    def get_new_dtype(self, converter, param, dtype: torch.dtype | None) -> torch.dtype | None:
        # No cast of what becomes bytes: a tensor of another type is refused, as it is with `dequantize=True`.
        packed = dtype is not None and not dtype.is_floating_point
        return None if packed else super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        self.conversions = Conversions(self, weight_conversions)
        return self.conversions.loading

    def packs(self, model: nn.Module, name: str) -> bool:
        """Whether a parameter is packed, or stands beside one that is."""
        module, parameter = _owner(model, name)
        return isinstance(module, PackedModule) and module.is_packed(parameter)

    def quantize_parameter(self, model: nn.Module, name: str, tensor: Tensor) -> Tensors:
        """Returns the parameters, by name, that the weight called `name` becomes."""
        module, weight = _owner(model, name)
        if weight not in getattr(module, "layouts", ()):
            return {name: tensor}
        expected = (*getattr(module, weight).shape[:-1], module.layouts[weight].in_features)
        if module.is_transposed or (tensor.ndim == 3 and tensor.shape != expected):
            tensor = tensor.mT
        if tensor.shape != expected:
            raise ValueError(f"The checkpoint's weight has shape {tuple(tensor.shape)}, expected {expected}.")
        matrices = []
        for i, matrix in enumerate(tensor if tensor.ndim == 3 else [tensor]):
            try:
                matrices.append(self._solve(name, module, matrix))
            except (ValueError, MemoryError) as error:
                raise ValueError(f"expert {i}: {error}" if tensor.ndim == 3 else str(error)) from error
        self.found(name)
        if tensor.ndim == 2:
            return {name + suffix: made for suffix, made in matrices[0].items()}
        return {name + suffix: torch.stack([made[suffix] for made in matrices]) for suffix in matrices[0]}

    def restore(self, name: str, tensors: Tensors) -> Tensors:
        """Returns in the form of memory what a checkpoint holds of the parameter `name`, or of a part of it."""
        if "_scale" not in tensors:
            raise DamagedTensor("not in the checkpoint.", "_scale")
        return self.from_file(self.layouts[name], tensors, name)

    def unpack(self, name: str, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Returns as weights what a checkpoint holds of the parameter `name`, or of a part of it."""
        made = self.restore(name, tensors)
        if "_column" not in made:
            return kernels.dequantize(made[""], made["_scale"], self.layouts[name], dtype)
        weight = kernels.dequantize(made[""], made["_scale"], self.layouts[name], torch.float32)
        return (weight * made["_column"][..., None, :]).to(dtype)

    def found(self, name: str) -> None:
        """Notes that the parameter `name` is not missing."""
        self.missing = {one for one in self.missing if one != name and not one.startswith(f"{name}_")}

    def fail(self, model: nn.Module, name: str, error: Exception) -> Tensors:
        """Remembers why a parameter could not be made, and returns something of its shape."""
        # Raised in a conversion it would end up in a table of the log. It is raised when the last tensor has been seen.
        self.failures.append(f"{name}{getattr(error, 'suffix', '')}: {error}")
        self.found(name)
        module, parameter = _owner(model, name)
        beside = module.companions(parameter) if self.packs(model, name) else ()
        return {
            name + suffix: torch.zeros_like(model.get_parameter_or_buffer(name + suffix), device="cpu")
            for suffix in ("", *beside)
        }

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        packed = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, PackedModule)]
        for prefix, module in packed:
            for name, parameter in module.named_parameters(recurse=False):
                loaded = parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)
                if not loaded and not module.is_packed(name):
                    self.missing.add(f"{prefix}.{name}")
        missing = sorted(self.missing)
        if len(missing) > 1 and self.missing >= self.layouts.keys():
            raise ValueError(
                f"{missing[0]}: not in the checkpoint, nor are {len(missing) - 1} more of {type(model).__name__}; is it the checkpoint "
                "of another class?"
            )
        self.failures += [f"{name}: not in the checkpoint." for name in missing]
        if self.failures:
            raise ValueError("\n".join(self.failures))
        for _, module in packed:
            for name in module.layouts:
                for parameter in module.companions(name).values():
                    parameter.requires_grad_(False)  # the loader trains whatever is floating
        used = model._weight_conversions
        self.plain_conversions = self.conversions.plain(used)
        dequantized = self.quantization_config.dequantize
        model._weight_conversions = self.plain_conversions if dequantized else self.conversions.packed(used)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Tensors | None, dict]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
        for module in modules.values():
            module.restore_scales()
        state = model.state_dict()
        for prefix, module in modules.items():
            for parameter, layout in module.layouts.items():
                names = {suffix: f"{prefix}.{parameter}{suffix}" for suffix in ("", *module.companions(parameter))}
                tensors = {
                    suffix: compat.load_offloaded_parameter(model, name) if state[name].is_meta else state[name]
                    for suffix, name in names.items()
                }
                for name in names.values():
                    del state[name]
                stored = self.to_file(layout, tensors)
                state |= {f"{prefix}.{parameter}{suffix}": tensor for suffix, tensor in stored.items()}
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # saving turns config.dtype into a string
        packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedModule)]
        for name, module in packed:
            if any(parameter.is_meta for parameter in module.parameters()):
                raise ValueError(
                    f"{name} is offloaded, so it cannot be dequantized in place. Load the checkpoint with "
                    f"`quantization_config={type(self.quantization_config).__name__}(dequantize=True)` instead."
                )
        for name, module in packed:
            plain = module.plain(dtype)
            # Below an adapter what was frozen stays frozen.
            plain.requires_grad_(not name.endswith(".base_layer"))
            model.set_submodule(name, plain)
            if name.endswith(".base_layer") and is_transposed(plain):
                # The adapter was made for rows of outputs.
                for part in model.get_submodule(name.removesuffix(".base_layer")).modules():
                    if hasattr(part, "fan_in_fan_out"):
                        part.fan_in_fan_out = True
        model._weight_conversions = self.plain_conversions
        return model

    def remove_quantization_config(self, model: nn.Module) -> None:
        conversions = getattr(model, "_weight_conversions", None)
        super().remove_quantization_config(model)
        if conversions is not None:
            # Transformers 5.24 forgets them here. Without them a model of experts is saved under the names of memory.
            model._weight_conversions = conversions

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        require("peft")  # without our guards a merge could damage packed weights
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _by_block(module: PackedModule, name: str, matrix: Tensor, function: Callable[[Tensor], Tensors]) -> Tensors:
    # Most checkpoints have gate and up apart: what comes out does not depend on that, and messages name the one.
    joined = name == "gate_up_proj" and module.is_concatenated and len(matrix) == getattr(module, name).shape[-2]
    results = []
    for block, half in zip(matrix.chunk(2) if joined else [matrix], ("gate_proj", "up_proj"), strict=False):
        try:
            results.append(function(block))
        except (ValueError, MemoryError) as error:
            raise ValueError(f"{half}: {error}" if joined else str(error)) from error
    return {suffix: torch.cat([made[suffix] for made in results]) for suffix in results[0]} if joined else results[0]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, parameter = name.rpartition(".")
    return model.get_submodule(module), parameter
