"""Base of the quantization backends of `from_pretrained(..., quantization_config=...)`.

A layer holds the bytes that the kernels read. A file has the tensors of its method's format, in the names and the
splitting of the model's own checkpoints: `experts.3.gate_proj.weight`, with its scales as
`experts.3.gate_proj.weight_scale`. Loading and `save_pretrained` go from one to the other; a state dict is what is in
memory.

Two paths lead through a quantizer, and on both each weight is a [`~hf_rb.quantizers.packed.weight.PackedWeight`].

**Loading**, `from_pretrained`. The loader of transformers calls, in this order:

    preprocess_model                        chooses what is packed (`selection.py`), puts packed modules in its place
                                            (`pack_module`)
    update_weight_conversions               gives the loader conversions of ours (`conversion.py`), which call for each
        quantize_matrix (`solve`), or       weight of a file that is not quantized
        restore (`from_file`)               weight of a file that is
    _process_model_after_weight_loading     refuses a model in which something is missing (`arrivals.py`)
    get_state_dict_and_metadata (`to_file`) when the model is saved

**Streaming**, `folders/stream.py`, which has no loader and the model on the meta device only:

    preprocess_model, prepare_streaming     as above; what a method has to know of the whole model
    streams                                 whether a tensor of the files is quantized, and then
        quantize_tensor                     what is stored instead (`quantize_matrix`, `to_file`)

`folders/gptq.py` reads a quantized folder with `preprocess_model` and `restore`.
"""

import time
from abc import abstractmethod
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from hf_rb.methods import QuantizerMethod
from hf_rb.quantizers.allocation.allocate import allocate_layers
from hf_rb.quantizers.config import PackedConfig
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.loading.arrivals import Arrivals
from hf_rb.quantizers.loading.conversion import Conversions
from hf_rb.quantizers.loading.matrices import Place, Solved, by_block
from hf_rb.quantizers.loading.mpi import refuse_mpi
from hf_rb.quantizers.loading.selection import select, setting
from hf_rb.quantizers.packed.baseline import rtn
from hf_rb.quantizers.packed.experts import PackedExperts, input_size
from hf_rb.quantizers.packed.layer_kinds import LINEAR, features, is_transposed
from hf_rb.quantizers.packed.linear import PackedLinear, PackedModule
from hf_rb.quantizers.packed.report import LayerReport, Report
from hf_rb.quantizers.packed.weight import SUFFIXES, PackedWeight
from hf_rb.utils import compat
from hf_rb.utils.import_hooks import require


__all__ = ["PackingQuantizer"]


class PackingQuantizer(HfQuantizer):
    """
    Quantizes a model while it loads, or loads one that is quantized already.

    A method is a subclass that says how a weight is laid out ([`~PackingQuantizer.layout_of`]), how it is solved, and
    how the tensors of a file differ from those in memory.

    Attributes:
        linear_class (`type[PackedLinear]`), experts_class (`type[PackedExperts]`): What takes the place of layers.
        beside (`tuple[str, ...]`): The tensors that a file may have beside the packed ones, attributes of
            [`~hf_rb.quantizers.packed.weight.PackedWeight`].
        report ([`~hf_rb.quantizers.Report`]):
            After quantizing: error, solver statistics and what was skipped. The model keeps it as
            `model.hf_quantizer.report`.
    """

    requires_calibration = False
    linear_class: type[PackedLinear] = PackedLinear
    experts_class: type[PackedExperts] = PackedExperts
    beside: tuple[str, ...] = ("scale",)
    quantization_config: PackedConfig  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.report = Report(method=quantization_config.quant_method)
        self.layouts: dict[str, Layout] = {}  # by the full name of a packed parameter
        self.arrivals = Arrivals()
        self.checkpoint_files: list[str] | None = None
        self.unpacked: set[str] = set()  # layers that a file has packed and the model cannot have so
        if quantization_config.dequantize and not self.pre_quantized:
            raise ValueError(
                f"`dequantize=True` is for loading a {self.record.name} checkpoint, and this one is not "
                "quantized. Quantize it first and call `model.dequantize()`, or leave `dequantize` out."
            )

    @abstractmethod
    def layout_of(self, name: str, in_features: int, units: Any) -> Layout:
        """
        Returns the layout of a weight.

        Args:
            name (`str`):
                Full name of the layer, or of the parameter of fused experts.
            in_features (`int`):
                Its columns.
            units (`int`):
                What the config gives to it: its bits or planes. `None` for a method without a unit.
        """

    def has_column(self, name: str, layout: Layout) -> bool:
        """Returns whether the inputs of a weight have a factor each."""
        return False

    def adds_bias(self, name: str) -> bool:
        """Returns whether a packed layer gets a bias that its original has not."""
        return False

    @abstractmethod
    def solve(self, layout: Layout, matrix: Tensor) -> Solved:
        """Quantizes a matrix."""

    @abstractmethod
    def to_file(self, layout: Layout, weight: PackedWeight) -> PackedWeight:
        """Returns what a file holds of a weight in memory."""

    @abstractmethod
    def from_file(self, layout: Layout, stored: PackedWeight, parameter: str) -> PackedWeight:
        """
        Inverse of [`~PackingQuantizer.to_file`], which checks every tensor.

        Raises:
            DamagedTensor: A tensor is none that this method writes.
        """

    @property
    def record(self) -> QuantizerMethod:
        """The record of the method."""
        return self.quantization_config.record

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the tensors that a file may have beside the packed ones."""
        return tuple(SUFFIXES[part] for part in self.beside)

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # pyrefly: ignore[bad-override]  (read-only here)
        return {"weight": [f"weight{suffix}" for suffix in ("", *self.suffixes)]}

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self.checkpoint_files = kwargs.get("checkpoint_files")
        if not self.quantization_config.dequantize:
            refuse_mpi(model, self.checkpoint_files, self.record.name)
        strategy = getattr(self.quantization_config, self.record.per_layer, None)
        if isinstance(strategy, str):
            found = allocate_layers(self.record, strategy, model, self.checkpoint_files)
            setattr(self.quantization_config, self.record.per_layer, {layer.name: layer.given for layer in found})
            self.report.allocation = found
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                f"{self.record.name} layers cannot be split over devices: leave out "
                "`distributed_config` and `tp_plan`."
            )
        for name, module, weights in self.choose(model):
            packed = self.pack_module(name, module, weights)
            self.layouts |= {f"{name}.{parameter}": layout for parameter, layout in packed.layouts.items()}
            if self.pre_quantized:
                for weight in weights:
                    self.arrivals.missing.update(packed.packed_weight(weight).named(f"{name}.{weight}"))
            if not self.quantization_config.dequantize and name not in self.unpacked:
                packed._is_hf_initialized = True  # bytes cannot be initialized; what is missing is reported
                model.set_submodule(name, packed)
        if not self.pre_quantized:
            self.arrivals.missing = set(self.layouts)
        return model

    def choose(self, model: PreTrainedModel) -> list[tuple[str, nn.Module, list[str]]]:
        """Returns what is packed, linear layers and fused experts with the names of their weights, and notes what is
        not.
        """
        found = select(model, self.quantization_config, self.pre_quantized, self.checkpoint_files)
        self.quantization_config, self.report.readers = found.config, found.readers
        self.report.skipped += found.skipped
        if self.pre_quantized:
            self.unpacked = set(found.readers)
        return found.packed

    def pack_module(self, name: str, module: nn.Module, weights: list[str]) -> PackedModule:
        """Returns the stand-in for a linear layer or fused experts, some `weights` of which are packed."""
        is_linear, layouts, columns = isinstance(module, LINEAR), {}, []
        for weight in weights:
            full = name if is_linear else f"{name}.{weight}"
            width = features(module)[0] if is_linear else input_size(module, weight)
            layouts[weight] = self.layout_of(full, width, self.units(full, name))
            if self.has_column(full, layouts[weight]):
                columns.append(weight)
        activations = getattr(self.quantization_config, "activations", "exact")
        if not is_linear:
            return self.experts_class(module, layouts, activations, tuple(columns))
        own: Any = module
        size = (*features(module), own.bias is not None or self.adds_bias(name))
        place = {"device": own.weight.device, "dtype": own.weight.dtype}
        packed = self.linear_class(*size, layouts["weight"], activations, bool(columns), **place)
        return packed.stand_in_for(module)

    def units(self, *names: str) -> Any:
        """Returns how many bits or planes the config gives to what has these names."""
        if not self.record.unit:
            return None
        by_pattern = getattr(self.quantization_config, self.record.per_layer)  # a strategy is a dictionary by now
        return setting(by_pattern, getattr(self.quantization_config, self.record.unit), *names)

    def make_room(self, source: Any, config: PreTrainedConfig, stored: Container[str], packed: set[str]) -> set[str]:
        """
        Turns the configuration of a quantized folder into one of an ordinary model that has a place for everything in
        the files, and returns the `packed` layers that get a bias there and have none in what is `stored`.

        Raises:
            ValueError: There is no such configuration.
        """
        return set()

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = _owner(model, param_name)
        return not self.pre_quantized and name in getattr(module, "layouts", ())

    def prepare_streaming(self, model: PreTrainedModel) -> None:
        """Is called with the model on the meta device before tensor after tensor is given to `quantize_tensor`."""

    def streams(self, model: PreTrainedModel, name: str) -> bool:
        """Returns whether a parameter is given to `quantize_tensor`, in pieces as a file has them."""
        return self.param_needs_quantization(model, name)

    def quantize_tensor(self, parameter: str, module: PackedModule, matrix: Tensor, place: Place) -> PackedWeight:
        """
        Quantizes a weight matrix for a file and adds it to the report.

        Args:
            parameter (`str`):
                Name of the packed parameter in the model.
            module ([`PackedModule`]):
                Module that has the parameter.
            matrix (`torch.Tensor`):
                Weights `(out, in)` of the layer or of one expert, or of one half of an expert's `gate_up_proj`.
            place ([`Place`]):
                Where in its parameter the matrix belongs, and a way to others.

        Returns:
            [`~hf_rb.quantizers.packed.weight.PackedWeight`]: What the file gets.

        Raises:
            ValueError: The matrix has a NaN, an infinite value or another width.
        """
        return self.to_file(
            module.layouts[parameter.rpartition(".")[2]], self.quantize_matrix(parameter, module, matrix)
        )

    def scale_bias(self, parameter: str, bias: Tensor, place: Place) -> Tensor:
        """Returns what a file gets for a bias, where [`~PackingQuantizer.streams`] is true of one."""
        return bias

    def quantize_matrix(self, parameter: str, module: PackedModule, matrix: Tensor) -> PackedWeight:
        """Quantizes a weight matrix for memory and adds it to the report; arguments and errors as for
        `quantize_tensor`.
        """
        weight = parameter.rpartition(".")[2]
        layout = module.layouts[weight]
        if matrix.shape[-1] != layout.in_features:
            raise ValueError(f"The weight has {matrix.shape[-1]} columns, expected {layout.in_features}.")

        def solve(block: Tensor) -> PackedWeight:
            start = time.perf_counter()
            packed, error, resolved = self.solve(layout, block)
            seconds = time.perf_counter() - start
            name = parameter.removesuffix(".weight")
            self.report.add(LayerReport(name, block.numel(), error, resolved, *rtn(block)), seconds)
            return packed

        return by_block(module, weight, matrix, solve)

    def get_quantize_ops(self) -> compat.ConversionOps:
        return compat.IdentityOp()  # the conversion has done it

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # No cast of what becomes bytes: a tensor of another type is refused, as it is with `dequantize=True`.
        packed = dtype is not None and not dtype.is_floating_point
        return None if packed else super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        self.conversions = Conversions(self, weight_conversions, self.arrivals)
        return self.conversions.loading

    def restore(self, parameter: str, stored: PackedWeight) -> PackedWeight:
        """
        Returns in the form of memory what a checkpoint holds of a parameter, or of a part of it.

        Raises:
            DamagedTensor: A tensor is none that this method writes.
        """
        return self.from_file(self.layouts[parameter], stored, parameter)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> PreTrainedModel:
        packed = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, PackedModule)]
        for prefix, module in packed:
            for name, parameter in module.named_parameters(recurse=False):
                loaded = parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)
                if not loaded and not module.is_packed(name):
                    self.arrivals.missing.add(f"{prefix}.{name}")
        self.arrivals.check(model, self.layouts)
        for _, module in packed:
            for name in module.layouts:
                for parameter in module.packed_weight(name).parts().values():
                    parameter.requires_grad_(False)  # the loader trains whatever is floating
        used = model._weight_conversions
        self.plain_conversions = self.conversions.plain(used)
        dequantized = self.quantization_config.dequantize
        model._weight_conversions = self.plain_conversions if dequantized else self.conversions.packed(used)
        return model

    def get_state_dict_and_metadata(  # pyrefly: ignore[bad-override]  (transformers' own returns None only)
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
        for module in modules.values():
            module.restore_scales()
        state = model.state_dict()
        for prefix, module in modules.items():
            for parameter, layout in module.layouts.items():
                name = f"{prefix}.{parameter}"
                tensors = {one: state.pop(one) for one in module.packed_weight(parameter).named(name)}
                for one, tensor in tensors.items():
                    if tensor.is_meta:
                        tensors[one] = compat.load_offloaded_parameter(model, one)
                state |= self.to_file(layout, PackedWeight.collect(name, tensors.get)).named(name)
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # Saving turns config.dtype into a string.
        wanted: Any = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedModule)]
        for name, module in packed:
            if any(parameter.is_meta for parameter in module.parameters()):
                raise ValueError(
                    f"{name} is offloaded, so it cannot be dequantized in place. Load the checkpoint with "
                    f"`quantization_config={type(self.quantization_config).__name__}(dequantize=True)` instead."
                )
        for name, module in packed:
            plain = module.plain(wanted)
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

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        conversions = getattr(model, "_weight_conversions", None)
        super().remove_quantization_config(model)
        if conversions is not None:
            # Transformers 5.24 forgets them here. Without them a model of experts is saved under the names of memory.
            model._weight_conversions = conversions

    def is_serializable(self) -> bool:  # pyrefly: ignore[bad-override]  (untyped there, with an empty body)
        return True

    @property
    def is_trainable(self) -> bool:  # pyrefly: ignore[bad-override]
        require("peft")  # without our guards a merge could damage packed weights
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _owner(model: PreTrainedModel, name: str) -> tuple[Any, str]:
    module, _, parameter = name.rpartition(".")
    return model.get_submodule(module), parameter
