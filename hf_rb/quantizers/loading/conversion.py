"""Conversion of the tensors of a checkpoint to packed parameters, in terms of transformers' loader.

A conversion says which tensors of a file make which parameter, and by which operations: experts 0 to 127 are stacked,
gate and up are joined. Where the result is packed, the same operations bring packed rows together, because they move
whole rows; what stands beside the bytes, tensors of their own named `<name>_scale` and the like, goes the same way.
What any other operation would do to packed rows is not defined: there the file of a quantized model has the names that
the parameters have in the model.

For Mixtral, transformers has three patterns (`*` is the number of an expert):

    .block_sparse_moe.      ->  .mlp.                   a renaming
    .experts.*.w1.weight,   ->  .experts.gate_up_proj   MergeModulelist(dim=0) stacks the experts of each source,
    .experts.*.w3.weight                                Concatenate(dim=1) joins the two
    .experts.*.w2.weight    ->  .experts.down_proj      MergeModulelist(dim=0)

Of these [`Conversions`] makes

- for a file that is not quantized (`_Quantize`), the same sources and targets. The model's own operations run first
  and give the weight `(experts, out, in)`; expert after expert it becomes a [`PackedWeight`], and the loader gets
  `gate_up_proj` and `gate_up_proj_scale`;
- for a quantized file (`_Read`), the sources and `w1.weight_scale`, `w3.weight_scale`, …. Each `w1.weight` is brought
  to the form of memory together with its scales; then the model's operations run on the bytes, and once more on the
  scales;
- for any other layer a conversion `.weight` -> `.weight` of the same kind, and the renaming as it is;
- for `save_pretrained` ([`~Conversions.packed`]), which runs conversions backwards, the original three, and those of
  `gate_up_proj_scale` and `down_proj_scale`, so that `experts.3.w1.weight_scale` is beside `experts.3.w1.weight`.

A weight goes from here to the quantizer and back once: as a matrix to [`~Packer.quantize_matrix`], or as the tensors
of a file to [`~Packer.restore`]. Stacking, joining, names and shapes are settled here.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.loading.arrivals import Arrivals
from hf_rb.quantizers.packed.layer_kinds import is_transposed
from hf_rb.quantizers.packed.linear import PackedModule
from hf_rb.quantizers.packed.weight import PackedWeight
from hf_rb.utils import compat


__all__ = ["Conversions", "Packer", "moves_rows"]

Made = TypeVar("Made")


class Packer(Protocol):
    """
    Interface of a quantizer to the conversions.

    Attributes:
        pre_quantized (`bool`): Whether the files are quantized.
        suffixes (`tuple[str, ...]`): Suffixes of the tensors that a file may have beside the packed ones.
        layouts (`dict[str, Layout]`): The kernels' layout of every packed parameter of the model.
    """

    pre_quantized: bool
    layouts: dict[str, Layout]

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    def quantize_matrix(self, parameter: str, module: PackedModule, matrix: Tensor) -> PackedWeight:
        """Returns in the form of memory a matrix `(out, in)` of a parameter."""
        ...

    def restore(self, parameter: str, stored: PackedWeight) -> PackedWeight:
        """Returns in the form of memory what a file holds of a parameter, or of a part of it."""
        ...


class Conversions:
    """
    The conversions of a model, with ours in the place of those that end in a packed parameter.

    Args:
        packer ([`Packer`]):
            Knows the packed parameters, and makes one out of tensors.
        originals (`list`):
            The model's conversions.
        arrivals ([`Arrivals`]):
            Is told which parameters were made.

    Attributes:
        loading (`list`): What the loader is to use.
    """

    def __init__(self, packer: Packer, originals: list, arrivals: Arrivals):
        self.loading: list = []
        self._suffixes = packer.suffixes
        self._origin: list[tuple[Any, Any]] = []  # one of ours, and what of the model's it stands for
        for conversion in originals:
            if not isinstance(conversion, compat.WeightConverter) or not _ends_in(conversion, packer.layouts):
                self.loading += [conversion, *(self._beside(conversion) if packer.pre_quantized else ())]
            elif moves_rows(conversion) or not packer.pre_quantized:
                # An operation that turns a tensor when the shape says so would look at the packed one.
                operations = [op for op in conversion.operations if not getattr(op, "check_dims", False)]
                self._add(packer, arrivals, conversion, operations, origin=conversion)
        # A file may have the parameter's own name: the `weight` of any module, `experts.down_proj`.
        ends = {tuple(name.split(".")[-2:]) for name in packer.layouts}
        for name in sorted({r"\.weight" if end[1] == "weight" else rf"\.{end[0]}\.{end[1]}" for end in ends}):
            own = compat.WeightConverter(name, name, [compat.IdentityOp()])
            self._add(packer, arrivals, own, [], origin=None)

    def _add(self, packer: Packer, arrivals: Arrivals, conversion: Any, operations: list, origin: Any) -> None:
        # Copies: a conversion changes the lists that it is made of.
        sources, targets = [*conversion._original_source_patterns], [*conversion._original_target_patterns]
        if packer.pre_quantized:
            sources = [*sources, *(pattern + suffix for suffix in self._suffixes for pattern in sources)]
        kind = _Read if packer.pre_quantized else _Quantize
        plain = [] if origin is None else origin.operations
        ours = conversion.copy(sources, targets, operations=[kind(packer, arrivals, operations, plain)])
        self.loading.append(ours)
        self._origin.append((ours, origin))

    def _beside(self, conversion: Any) -> list:
        """Returns the renamings of a weight's companions (`weight_scale`, …) that go with a renaming of the weight."""
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        # A renaming of a module already covers all tensors inside it.
        if not isinstance(conversion, compat.WeightRenaming) or not all(one.endswith(".weight") for one in targets):
            return []
        return [
            conversion.copy([one + suffix for one in sources], [one + suffix for one in targets])
            for suffix in self._suffixes
        ]

    def plain(self, used: list) -> list:
        """Returns the conversions whose reverse saves an ordinary model; `used` are those of `loading` that
        matched.
        """
        kept = []
        for conversion in used:
            ours = [origin for one, origin in self._origin if one is conversion]
            kept += [conversion] if not ours else [origin for origin in ours if origin is not None]
        return kept

    def packed(self, used: list) -> list:
        """Returns the conversions whose reverse saves the packed model."""
        replaced, kept = [origin for _, origin in self._origin], []
        for conversion in self.plain(used):
            if not any(conversion is origin for origin in replaced):
                kept += [conversion, *self._beside(conversion)]
            elif moves_rows(conversion):
                patterns = conversion._original_source_patterns, conversion._original_target_patterns
                for suffix in ("", *self._suffixes):
                    sources, targets = ([pattern + suffix for pattern in side] for side in patterns)
                    kept.append(conversion.copy(sources, targets, operations=list(conversion.operations)))
        return kept


def moves_rows(conversion: Any) -> bool:
    """Returns whether a conversion only stacks experts and joins rows, and so does to packed rows what it does to
    weights.
    """
    stacked = any(isinstance(operation, compat.MergeModulelist) for operation in conversion.operations)
    rows = {compat.MergeModulelist: 0, compat.Concatenate: 1 if stacked else 0}
    return all(type(op) in rows and op.dim == rows[type(op)] for op in conversion.operations)


def _ends_in(conversion: Any, names: dict) -> bool:
    targets = conversion._original_target_patterns
    # A target may be a layer, of which a file has the weight and the bias in one: the query, key and value of a fused
    # projection.
    return any(re.search(rf"(?:{target})(?:\.weight)?$", name) for target in targets for name in names)


class _Operation(compat.ConversionOps):
    """
    Args:
        packer ([`Packer`]), arrivals ([`Arrivals`]):
            Those of [`Conversions`].
        operations (`list`):
            The model's operations that bring the tensors together, where the result is packed.
        plain (`list`):
            The same where it is not.
    """

    def __init__(self, packer: Packer, arrivals: Arrivals, operations: list, plain: list):
        self.packer, self.arrivals, self.operations, self.plain = packer, arrivals, operations, plain

    def __deepcopy__(self, memo: dict) -> "_Operation":
        return self  # the loader copies a conversion for every parameter

    def run(self, tensors: dict, full_layer_name: str, packed: bool = True, **kwargs: Any) -> dict:
        operations = self.operations if packed else self.plain
        for operation in operations:
            tensors = operation.convert(tensors, full_layer_name=full_layer_name, **kwargs)
        if not operations and len(tensors) == 1:  # under a pattern, which the loader takes for a part of the name
            return {full_layer_name: next(iter(tensors.values()))}
        return tensors

    def failed(self, model: PreTrainedModel, name: str, error: Exception) -> dict[str, Tensor]:
        """Notes why a parameter could not be made, and returns something of its shape."""
        self.arrivals.failed(name, error)
        module, parameter = _owner(model, name)
        is_packed = parameter in getattr(module, "layouts", ())
        names = module.packed_weight(parameter).named(name) if is_packed else [name]
        return {one: torch.zeros_like(model.get_parameter_or_buffer(one), device="cpu") for one in names}

    @property
    def reverse_op(self) -> compat.ConversionOps:
        return compat.IdentityOp()


class _Quantize(_Operation):
    """Weights of a checkpoint -> a packed parameter and what stands beside it; what is not packed passes."""

    def convert(  # pyrefly: ignore[bad-override]  (the loader passes names)
        self, input_dict: dict, *, full_layer_name: str, target_patterns: list, model: PreTrainedModel, **kwargs: Any
    ) -> dict:
        kwargs = dict(kwargs, target_patterns=target_patterns, model=model)
        if not _is_packed(model, full_layer_name) and len(target_patterns) == 1:
            return self.run(input_dict, full_layer_name, packed=False, **kwargs)
        try:
            _check_alike(input_dict)
            tensors = self.run(input_dict, full_layer_name, **kwargs)
        except (ValueError, RuntimeError, MemoryError) as error:
            return self.failed(model, full_layer_name, error)
        result = {}
        for key, value in tensors.items():
            name = full_layer_name if len(tensors) == 1 else full_layer_name.replace(target_patterns[0], key)
            try:
                result |= self._quantize(model, name, _single(value))
            except (ValueError, MemoryError) as error:
                result |= self.failed(model, name, error)
        return result

    def _quantize(self, model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Returns the parameters, by name, that the weight called `name` becomes."""
        module, weight = _owner(model, name)
        if weight not in getattr(module, "layouts", ()):
            return {name: tensor}
        expected = (*getattr(module, weight).shape[:-1], module.layouts[weight].in_features)
        if module.is_transposed or (tensor.ndim == 3 and tensor.shape != expected):
            tensor = tensor.mT
        _check_shape(tensor, expected)
        if tensor.ndim == 2:
            packed = self.packer.quantize_matrix(name, module, tensor)
        else:
            experts = []
            for i, matrix in enumerate(tensor):
                try:
                    experts.append(self.packer.quantize_matrix(name, module, matrix))
                except (ValueError, MemoryError) as error:
                    raise ValueError(f"expert {i}: {error}") from error
            packed = PackedWeight.join(experts, torch.stack)
        self.arrivals.arrived(name)
        return packed.named(name)


class _Read(_Operation):
    """
    Packed tensors of a checkpoint -> a packed parameter and what stands beside it, or an ordinary parameter where the
    model has one; what is not packed passes.
    """

    @property
    def hf_quantizer(self) -> Packer:
        return self.packer  # the name by which the loader knows not to cast what comes in

    def convert(  # pyrefly: ignore[bad-override]
        self, input_dict: dict, *, full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict:
        kwargs = dict(kwargs, model=model)
        packed, dtype = _is_packed(model, full_layer_name), _dtype(model, full_layer_name)
        layout = self.packer.layouts.get(full_layer_name)
        if layout is None:
            tensors = {name: [tensor.to(dtype) for tensor in found] for name, found in input_dict.items()}
            return self.run(tensors, full_layer_name, packed=False, **kwargs)

        def join(tensors: dict[str, list[Tensor]], name: str) -> Tensor:
            ((_, value),) = self.run(tensors, full_layer_name, **kwargs).items()
            value = _single(value)
            if not packed and is_transposed(_owner(model, full_layer_name)[0]):
                value = value.mT.contiguous()
            _check_shape(value, model.get_parameter(name).shape)
            return value

        def restore(stored: PackedWeight) -> PackedWeight:
            return self.packer.restore(full_layer_name, stored)

        try:
            if packed:
                restored = self._each(input_dict, restore)
                # All experts have the same tensors: the method has checked it.
                named = {pattern: [one.named(full_layer_name) for one in found] for pattern, found in restored.items()}
                names = next(iter(named.values()))[0]
                result = {
                    name: join({pattern: [one[name] for one in found] for pattern, found in named.items()}, name)
                    for name in names
                }
            else:
                weights = self._each(input_dict, lambda stored: restore(stored).dequantize(layout, dtype))
                result = {full_layer_name: join(weights, full_layer_name)}
        except (ValueError, RuntimeError, MemoryError) as error:
            return self.failed(model, full_layer_name, error)
        self.arrivals.arrived(full_layer_name)
        return result

    def _each(self, input_dict: dict, make: Callable[[PackedWeight], Made]) -> dict[str, list[Made]]:
        """Returns by pattern, in the order of the file, what `make` makes of every packed weight."""
        _check_alike(input_dict)
        packed = {
            pattern: found for pattern, found in input_dict.items() if not pattern.endswith(self.packer.suffixes)
        }
        if not packed:
            raise ValueError("There are scales and no packed tensor.")
        result: dict[str, list[Made]] = {pattern: [] for pattern in packed}
        for pattern, found in packed.items():
            for i in range(len(found)):
                try:
                    stored = PackedWeight.collect(
                        pattern, lambda one, i=i: input_dict[one][i] if one in input_dict else None
                    )
                    result[pattern].append(make(stored))
                except ValueError as error:
                    if "*" not in pattern:
                        raise
                    raise ValueError(f"{pattern.replace('*', str(i))}: {error}") from error
        return result


def _is_packed(model: PreTrainedModel, name: str) -> bool:
    """Returns whether a parameter is packed, or stands beside one that is."""
    module, parameter = _owner(model, name)
    return isinstance(module, PackedModule) and module.is_packed(parameter)


def _owner(model: PreTrainedModel, name: str) -> tuple[Any, str]:
    module, _, parameter = name.rpartition(".")
    return model.get_submodule(module), parameter


def _dtype(model: PreTrainedModel, name: str) -> torch.dtype:
    """Returns the type that the loader gives a parameter."""
    dtype = model.get_parameter_or_buffer(name).dtype
    plan = model._get_dtype_plan(dtype) if dtype.is_floating_point else {}
    return next((kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), name)), dtype)


def _single(value: Tensor | list[Tensor]) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _check_shape(tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"The checkpoint's weight has shape {tuple(tensor.shape)}, expected {tuple(expected)}.")


def _check_alike(input_dict: dict) -> None:
    longest = max(input_dict, key=lambda pattern: len(input_dict[pattern]))
    for pattern, tensors in input_dict.items():
        if len(tensors) < len(input_dict[longest]):
            raise ValueError(
                f"The checkpoint has {len(tensors)} tensors {pattern} and {len(input_dict[longest])} tensors "
                f"{longest}."
            )
    for pattern, tensors in input_dict.items():
        shapes = Counter(tuple(tensor.shape) for tensor in tensors)
        usual = shapes.most_common(1)[0][0]
        for i, tensor in enumerate(tensors):
            if tensor.shape != usual:
                name = pattern.replace("*", str(i))
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its neighbours have {usual}.")
