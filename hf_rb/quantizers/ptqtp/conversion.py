"""How the tensors of a checkpoint become packed parameters, in terms of transformers' loader.

A conversion says which tensors of a file make which parameter, and by which operations: experts 0 to 127 are stacked, gate and
up are joined. Where the result is packed, the same operations bring packed rows together, because they move whole rows; the
scales, a tensor of their own named `<name>_scale`, go the same way. What any other operation would do to packed rows is not
defined: there the file of a quantized model has the names that the parameters have in the model.
"""

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_rb import _compat


if TYPE_CHECKING:
    from hf_rb.quantizers.ptqtp.quantizer import PTQTPQuantizer

__all__ = ["Conversions", "moves_rows"]


class Conversions:
    """
    The conversions of a model, with ours in the place of those that end in a packed parameter.

    Args:
        quantizer ([`PTQTPQuantizer`]):
            Knows the packed parameters, and makes one out of a tensor.
        originals (`list`):
            The model's conversions.

    Attributes:
        loading (`list`): What the loader is to use.
    """

    def __init__(self, quantizer: "PTQTPQuantizer", originals: list):
        self.loading: list = []
        self._origin: list[tuple[Any, Any]] = []  # one of ours, and what of the model's it stands for
        for conversion in originals:
            if not isinstance(conversion, _compat.WeightConverter) or not _ends_in(conversion, quantizer.layouts):
                self.loading.append(conversion)
            elif moves_rows(conversion) or not quantizer.pre_quantized:
                # An operation that turns a tensor when the shape says so would look at the packed one.
                operations = [op for op in conversion.operations if not getattr(op, "check_dims", False)]
                self._add(quantizer, conversion, operations, origin=conversion)
        # What a file has under the parameter's own name: the `weight` of any module, `experts.down_proj`.
        ends = {tuple(name.split(".")[-2:]) for name in quantizer.layouts}
        for name in sorted({"weight" if end[1] == "weight" else rf"\.{end[0]}\.{end[1]}" for end in ends}):
            self._add(quantizer, _compat.WeightConverter(name, name, [_compat.IdentityOp()]), [], origin=None)

    def _add(self, quantizer: "PTQTPQuantizer", conversion: Any, operations: list, origin: Any) -> None:
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        if quantizer.quantization_config.dequantize:
            operation = _Dequantize(quantizer, operations)
            ours = [conversion.copy([*sources, *_scales(sources)], targets, operations=[operation])]
        else:
            ours = [conversion.copy(sources, targets, operations=[_Load(quantizer, operations)])]
            if quantizer.pre_quantized:
                operation = _Load(quantizer, operations)
                ours.append(conversion.copy(_scales(sources), _scales(targets), operations=[operation]))
        self.loading += ours
        self._origin += zip(ours, [origin, None], strict=False)

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
                kept.append(conversion)
            elif moves_rows(conversion):
                sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
                operations = list(conversion.operations)
                kept += [conversion, conversion.copy(_scales(sources), _scales(targets), operations=operations)]
        return kept


def moves_rows(conversion: Any) -> bool:
    """Whether a conversion only stacks experts and joins rows, and so does to packed rows what it does to weights."""
    stacked = any(isinstance(operation, _compat.MergeModulelist) for operation in conversion.operations)
    rows = {_compat.MergeModulelist: 0, _compat.Concatenate: 1 if stacked else 0}
    return all(type(op) in rows and op.dim == rows[type(op)] for op in conversion.operations)


def _ends_in(conversion: Any, names: dict) -> bool:
    targets = conversion._original_target_patterns
    return any(re.search(f"(?:{target})$", name) for target in targets for name in names)


def _scales(patterns: list[str]) -> list[str]:
    return [f"{pattern}_scale" for pattern in patterns]


class _Operation(_compat.ConversionOps):
    def __init__(self, quantizer: "PTQTPQuantizer", operations: list = ()):
        self.quantizer, self.operations = quantizer, operations

    def __deepcopy__(self, memo: dict) -> "_Operation":
        return self  # the loader copies a conversion for every parameter

    def run(self, tensors: dict, full_layer_name: str, **kwargs) -> dict:
        for operation in self.operations:
            tensors = operation.convert(tensors, full_layer_name=full_layer_name, **kwargs)
        return tensors

    @property
    def reverse_op(self) -> _compat.ConversionOps:
        return _compat.IdentityOp()


class _Load(_Operation):
    """Tensors of a checkpoint -> a packed parameter, or its scales, or both; what is not packed passes."""

    def convert(
        self, input_dict: dict, *, full_layer_name: str, target_patterns: list, model: nn.Module, **kwargs
    ) -> dict:
        quantizer, kwargs = self.quantizer, dict(kwargs, target_patterns=target_patterns, model=model)
        if not quantizer.packs(model, full_layer_name) and len(target_patterns) == 1:
            return self.run(input_dict, full_layer_name, **kwargs)
        try:
            _check_alike(input_dict)
            tensors = self.run(input_dict, full_layer_name, **kwargs)
        except (ValueError, RuntimeError, MemoryError) as error:
            return quantizer.fail(model, full_layer_name, error)
        result = {}
        for key, value in tensors.items():
            tensor = value if isinstance(value, Tensor) else value[0]
            name = full_layer_name if len(tensors) == 1 else full_layer_name.replace(target_patterns[0], key)
            try:
                result |= quantizer.load(model, name, tensor)
            except (ValueError, MemoryError) as error:
                result |= quantizer.fail(model, name, error)
        return result


class _Dequantize(_Operation):
    """Packed tensors of a checkpoint with their scales -> an ordinary parameter; what is not packed passes."""

    @property
    def hf_quantizer(self) -> "PTQTPQuantizer":
        return self.quantizer  # the name by which the loader knows not to cast what comes in

    def convert(self, input_dict: dict, *, full_layer_name: str, model: nn.Module, **kwargs) -> dict:
        quantizer, target = self.quantizer, model.get_parameter_or_buffer(full_layer_name)
        kwargs["model"] = model
        if full_layer_name not in quantizer.layouts:
            tensors = {name: [tensor.to(target.dtype) for tensor in found] for name, found in input_dict.items()}
            return self.run(tensors, full_layer_name, **kwargs)
        try:
            _check_alike(input_dict)
            weights = {name: found for name, found in input_dict.items() if not name.endswith("_scale")}
            for name, found in weights.items():
                scales = input_dict.get(f"{name}_scale", [])
                if len(scales) != len(found):
                    raise ValueError(f"{len(found)} packed tensors come with {len(scales)} tensors of scales.")
                weights[name] = []
                for i, (packed, scale) in enumerate(zip(found, scales, strict=True)):
                    try:
                        weights[name].append(quantizer.unpack(full_layer_name, packed, scale, target.dtype))
                    except ValueError as error:
                        raise ValueError(f"{name.replace('*', str(i))}: {error}" if "*" in name else error) from error
            if not weights:
                raise ValueError("There are scales and no packed tensor.")
            ((_, weight),) = self.run(weights, full_layer_name, **kwargs).items()
            weight = weight if isinstance(weight, Tensor) else weight[0]
            if getattr(model.get_submodule(full_layer_name.rpartition(".")[0]), "is_transposed", False):
                weight = weight.mT.contiguous()
            if weight.shape != target.shape:
                shapes = tuple(weight.shape), tuple(target.shape)
                raise ValueError(f"The checkpoint's weight has shape {shapes[0]}, expected {shapes[1]}.")
        except (ValueError, RuntimeError, MemoryError) as error:
            return quantizer.fail(model, full_layer_name, error)
        quantizer.missing -= {full_layer_name, f"{full_layer_name}_scale"}
        return {full_layer_name: weight}


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
