"""Names of the parameters that the tensors of a model's files become, by transformers' own rules."""

from typing import Any

from transformers import PreTrainedModel

from hf_rb.utils import compat


__all__ = ["ParameterNames"]


class ParameterNames:
    """Finds the parameters that a tensor of the files becomes, by transformers' own rules for the model."""

    def __init__(self, model: PreTrainedModel):
        rules = compat.get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, compat.WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, compat.WeightConverter)]
        self.by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self.prefix, self.known = model.base_model_prefix, model.state_dict()

    def __call__(self, name: str) -> tuple[list[str], Any, str, int]:
        """
        Returns the parameters, none if the model has no place for it; the conversion, if any; its name when saved; and
        which of the tensors that a conversion joins it is.
        """
        rules = self.renamings, self.converters
        parameter, pattern = compat.rename_source_key(name, *rules, self.prefix, self.known)
        if parameter not in self.known and name in self.known:
            rules = [], []
            parameter, pattern = compat.rename_source_key(name, *rules, self.prefix, self.known)
        if parameter not in self.known:
            return [], None, name, 0
        # Saving brings back the names of the files, but for the prefix that tells a model with a head from one
        # without.
        bare, _ = compat.rename_source_key(name, *rules)
        if parameter == f"{self.prefix}.{bare}":
            name = f"{self.prefix}.{name}"
        elif bare == f"{self.prefix}.{parameter}":
            name = name.removeprefix(f"{self.prefix}.")
        if pattern is None:
            return [parameter], None, name, 0
        converter = self.by_pattern[pattern]
        first = converter.target_patterns[0]
        parameters = [parameter.replace(first, target) for target in converter.target_patterns]
        return parameters, converter, name, converter.source_patterns.index(pattern)
