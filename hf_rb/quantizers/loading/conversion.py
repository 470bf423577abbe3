"""How the tensors of a checkpoint become packed parameters, in terms of transformers' loader.

A conversion says which tensors of a file make which parameter, and by which operations: experts 0 to 127 are stacked, gate and
up are joined. Where the result is packed, the same operations bring packed rows together, because they move whole rows; what
stands beside the bytes, tensors of their own named `<name>_scale` and the like, goes the same way. What any other operation
would do to packed rows is not defined: there the file of a quantized model has the names that the parameters have in the model.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_rb.quantizers.packed.layer_kinds import is_transposed
from hf_rb.utils import compat


if TYPE_CHECKING:
    from hf_rb.quantizers.loading.quantizer import PackingQuantizer

__all__ = ["Conversions", "moves_rows"]


class Conversions:
    """
    The conversions of a model, with ours in the place of those that end in a packed parameter.

    Args:
        quantizer ([`PackingQuantizer`]):
            Knows the packed parameters, and makes one out of tensors.
        originals (`list`):
            The model's conversions.

    Attributes:
        loading (`list`): What the loader is to use.
    """

    def __init__(self, quantizer: "PackingQuantizer", originals: list):
        self.loading: list = []
        self._suffixes = quantizer.suffixes
        self._origin: list[tuple[Any, Any]] = []  # one of ours, and what of the model's it stands for
        for conversion in originals:
            if not isinstance(conversion, compat.WeightConverter) or not _ends_in(conversion, quantizer.layouts):
                self.loading += [conversion, *(self._beside(conversion) if quantizer.pre_quantized else ())]
            elif moves_rows(conversion) or not quantizer.pre_quantized:
                # An operation that turns a tensor when the shape says so would look at the packed one.
                operations = [op for op in conversion.operations if not getattr(op, "check_dims", False)]
                self._add(quantizer, conversion, operations, origin=conversion)
        # What a file has under the parameter's own name: the `weight` of any module, `experts.down_proj`.
        ends = {tuple(name.split(".")[-2:]) for name in quantizer.layouts}
        for name in sorted({r"\.weight" if end[1] == "weight" else rf"\.{end[0]}\.{end[1]}" for end in ends}):
            self._add(quantizer, compat.WeightConverter(name, name, [compat.IdentityOp()]), [], origin=None)

    def _add(self, quantizer: "PackingQuantizer", conversion: Any, operations: list, origin: Any) -> None:
        # Copies: a conversion changes the lists that it is made of.
        sources, targets = [*conversion._original_source_patterns], [*conversion._original_target_patterns]
        if quantizer.pre_quantized:
            sources = [*sources, *(pattern + suffix for suffix in self._suffixes for pattern in sources)]
        kind = _Read if quantizer.pre_quantized else _Quantize
        plain = [] if origin is None else origin.operations
        ours = conversion.copy(sources, targets, operations=[kind(quantizer, operations, plain)])
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
        """Returns the conversions whose reverse saves an ordinary model; `used` are those of `loading` that matched."""
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
    """Whether a conversion only stacks experts and joins rows, and so does to packed rows what it does to weights."""
    stacked = any(isinstance(operation, compat.MergeModulelist) for operation in conversion.operations)
    rows = {compat.MergeModulelist: 0, compat.Concatenate: 1 if stacked else 0}
    return all(type(op) in rows and op.dim == rows[type(op)] for op in conversion.operations)


def _ends_in(conversion: Any, names: dict) -> bool:
    targets = conversion._original_target_patterns
    # A target may be a layer, of which a file has the weight and the bias in one: the query, key and value of a fused projection.
    return any(re.search(rf"(?:{target})(?:\.weight)?$", name) for target in targets for name in names)


class _Operation(compat.ConversionOps):
    def __init__(self, quantizer: "PackingQuantizer", operations: list, plain: list):
        self.quantizer, self.operations, self.plain = quantizer, operations, plain

    def __deepcopy__(self, memo: dict) -> "_Operation":
        return self  # the loader copies a conversion for every parameter

    def run(self, tensors: dict, full_layer_name: str, packed: bool = True, **kwargs) -> dict:
        operations = self.operations if packed else self.plain
        for operation in operations:
            tensors = operation.convert(tensors, full_layer_name=full_layer_name, **kwargs)
        if not operations and len(tensors) == 1:  # under a pattern, which the loader takes for a part of the name
            return {full_layer_name: next(iter(tensors.values()))}
        return tensors

    @property
    def reverse_op(self) -> compat.ConversionOps:
        return compat.IdentityOp()


class _Quantize(_Operation):
    """Weights of a checkpoint -> a packed parameter and what stands beside it; what is not packed passes."""

    def convert(
        self, input_dict: dict, *, full_layer_name: str, target_patterns: list, model: nn.Module, **kwargs
    ) -> dict:
        quantizer, kwargs = self.quantizer, dict(kwargs, target_patterns=target_patterns, model=model)
        if not quantizer.packs(model, full_layer_name) and len(target_patterns) == 1:
            return self.run(input_dict, full_layer_name, packed=False, **kwargs)
        try:
            _check_alike(input_dict)
            tensors = self.run(input_dict, full_layer_name, **kwargs)
        except (ValueError, RuntimeError, MemoryError) as error:
            return quantizer.fail(model, full_layer_name, error)
        result = {}
        for key, value in tensors.items():
            name = full_layer_name if len(tensors) == 1 else full_layer_name.replace(target_patterns[0], key)
            try:
                result |= quantizer.quantize_parameter(model, name, _single(value))
            except (ValueError, MemoryError) as error:
                result |= quantizer.fail(model, name, error)
        return result


class _FromPacked(_Operation):
    """The packed tensors of a checkpoint, each with its companions, -> a parameter."""

    def parts(self, input_dict: dict, name: str, make: Callable) -> dict[str, dict[str, list[Tensor]]]:
        """Returns what `make` makes of every packed tensor, by suffix, then by pattern, in the order of the file."""
        _check_alike(input_dict)
        suffixes = self.quantizer.suffixes
        packed = {pattern: found for pattern, found in input_dict.items() if not pattern.endswith(suffixes)}
        if not packed:
            raise ValueError("There are scales and no packed tensor.")
        result: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, found in packed.items():
            beside = {suffix: input_dict[pattern + suffix] for suffix in suffixes if pattern + suffix in input_dict}
            for i, tensor in enumerate(found):
                try:
                    made = make(name, {"": tensor} | {suffix: found[i] for suffix, found in beside.items()})
                except ValueError as error:
                    if "*" not in pattern:
                        raise
                    raise ValueError(f"{pattern.replace('*', str(i))}: {error}") from error
                for suffix, value in made.items():
                    result.setdefault(suffix, {}).setdefault(pattern, []).append(value)
        return result


class _Read(_FromPacked):
    """
    Packed tensors of a checkpoint -> a packed parameter and what stands beside it, or an ordinary parameter where the model has
    one; what is not packed passes.
    """

    @property
    def hf_quantizer(self) -> "PackingQuantizer":
        return self.quantizer  # the name by which the loader knows not to cast what comes in

    def convert(self, input_dict: dict, *, full_layer_name: str, model: nn.Module, **kwargs) -> dict:
        quantizer, kwargs = self.quantizer, dict(kwargs, model=model)
        packed, dtype = quantizer.packs(model, full_layer_name), _dtype(model, full_layer_name)
        if full_layer_name not in quantizer.layouts:
            tensors = {name: [tensor.to(dtype) for tensor in found] for name, found in input_dict.items()}
            return self.run(tensors, full_layer_name, packed=False, **kwargs)

        def weight(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"": quantizer.unpack(name, tensors, dtype)}

        result = {}
        try:
            parts = self.parts(input_dict, full_layer_name, quantizer.restore if packed else weight)
            for suffix, tensors in parts.items():
                ((_, value),) = self.run(tensors, full_layer_name, **kwargs).items()
                value = _single(value)
                if not packed and is_transposed(_module(model, full_layer_name)):
                    value = value.mT.contiguous()
                _check_shape(value, model.get_parameter(full_layer_name + suffix).shape)
                result[full_layer_name + suffix] = value
        except (ValueError, RuntimeError, MemoryError) as error:
            return quantizer.fail(model, full_layer_name, error)
        quantizer.found(full_layer_name)
        return result


def _module(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _dtype(model: nn.Module, name: str) -> torch.dtype:
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
                f"The checkpoint has {len(tensors)} tensors {pattern} and {len(input_dict[longest])} tensors {longest}."
            )
    for pattern, tensors in input_dict.items():
        shapes = Counter(tuple(tensor.shape) for tensor in tensors)
        usual = shapes.most_common(1)[0][0]
        for i, tensor in enumerate(tensors):
            if tensor.shape != usual:
                name = pattern.replace("*", str(i))
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its neighbours have {usual}.")
