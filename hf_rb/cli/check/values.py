"""The values of a recipe against the entries of its keys: types, choices, ranges, and keys that there are not."""

import json
from collections.abc import Collection
from difflib import get_close_matches
from itertools import chain
from types import SimpleNamespace
from typing import Any

from hf_rb.cli import schemas
from hf_rb.cli.check.findings import Findings
from hf_rb.cli.check.rules import TRAINED
from hf_rb.methods.registry import find, methods, name_problem
from hf_rb.quantizers.rules import quantizer_rules
from hf_rb.trainers.distillation.rules import only_gkd
from hf_rb.utils.fields import value_problem
from hf_rb.utils.renamed import former_key, nearest_key


__all__ = ["ValueChecker"]


class ValueChecker:
    """Compares values with the keys of a schema and writes what is wrong into a report."""

    def __init__(self, findings: Findings):
        self.findings = findings

    def values(
        self, given: dict[str, Any], keys: dict[str, dict], prefix: str = "", from_text: bool = True
    ) -> dict[str, Any]:
        """Returns the good ones of the given values over the defaults, so that the rules can run in any case."""
        values = {key: entry.get("default") for key, entry in keys.items()}
        for key, value in given.items():
            if key not in keys:
                self._unknown(key, keys, prefix)
                continue
            try:
                values[key] = self._value(prefix + key, value, keys[key], from_text)
            except ValueError as error:
                self.findings.errors.append(str(error))
        for key, entry in keys.items():
            if "default" not in entry and key not in given:
                self.findings.errors.append(f"`{prefix}{key}` is missing.")
        return values

    def _unknown(self, key: Any, keys: Collection[str], prefix: str) -> None:
        problem = former_key(key, keys, prefix) or (None if prefix else only_gkd(key))
        if problem:
            self.findings.errors.append(problem)
            return
        names = schemas.quantization() if prefix.endswith("quantization_config.") else ()
        if owner := next((name for name in names if key in schemas.load(name)), None):
            instead = _counterpart(key, owner, keys)
            hint = f"; this method has `{instead}` (`--{instead.replace('_', '-')}`)." if instead else "."
            self.findings.errors.append(f"`{prefix}{key}` is of `quant_method: {owner}` (`--method {owner}`){hint}")
            return
        close = nearest_key(key, keys)
        message = f"unknown key `{prefix}{key}`" + (f"; did you mean `{prefix}{close}`?" if close else ".")
        # The keys of other verbs are not read for a typo.
        verbs = () if prefix or get_close_matches(str(key), keys, n=1, cutoff=0.9) else schemas.RECIPES
        owners = [f"`hf-rb {verb}`" for verb in verbs if key in schemas.load(verb)]
        if owners:
            self.findings.errors.append(
                f"`{key}` is a key of {' and '.join(owners)}, and this recipe is for `hf-rb {self.findings.verb}`. "
                "Remove it, or use that verb."
            )
        else:
            self.findings.errors.append(message)

    def _value(self, key: str, value: Any, entry: dict[str, Any], from_text: bool) -> Any:
        # The parser of the training scripts takes a scalar for a list of one.
        if from_text and self.findings.verb in TRAINED and _is_one_of_a_list(value, entry["types"]):
            value = value if "str" in entry["types"] else [value]
        value = _convert(key, value, entry["types"], from_text)
        problem = value_problem(key, value, choices=entry.get("choices"), range=entry.get("range"))
        if problem:
            raise ValueError(problem)
        if "keys" in entry:
            value = [self.values(item, entry["keys"], f"{key}[{index}].") for index, item in enumerate(value)]
        if key == "quantization_config":
            self._quantization(key, {"quant_method": "ptqtp"} | value)  # the default of `hf-rb quantize`
        elif key == "training":  # of `hf-rb recover`
            self.values(value, schemas.load("training"), "training.", from_text=False)
        elif isinstance(value, dict):
            self._quantization(f"{key}.quantization_config", value.get("quantization_config"))
        return value

    def _quantization(self, key: str, config: Any) -> None:
        """Checks a quantization config, if it is one of ours. It reaches its class as YAML gives it: no text is
        converted.
        """
        method = config.get("quant_method") if isinstance(config, dict) else None
        if isinstance(method, str) and method in schemas.quantization():
            before = len(self.findings.errors)
            values = self.values(config, schemas.load(method), f"{key}.", from_text=False)
            record, namespace = find("quantizer", method).method, SimpleNamespace(**values)
            rules = chain(quantizer_rules(record, namespace), record.recipe_rules(namespace))
            if len(self.findings.errors) == before:  # otherwise the rules would speak of defaults that nobody wrote
                self.findings.errors += [f"`{key}`: {problem}" for problem in rules]
        elif key == "quantization_config" and isinstance(config, dict):
            self.findings.errors += filter(None, [name_problem("quantizer", str(method), f"{key}.quant_method")])
        # Elsewhere it may be a method of another library; "quanto" is further away than this.
        elif close := get_close_matches(str(method), schemas.quantization(), n=1, cutoff=0.8):
            self.findings.warnings.append(f"`{key}.quant_method` is {method!r}; did you mean {close[0]!r}?")


def _counterpart(key: str, owner: str, keys: Collection[str]) -> str | None:
    """Returns the key of another quantizer that means what this one means for its owner."""
    mine, all_methods = find("quantizer", owner).method, [entry.method for entry in methods("quantizer").values()]
    same = {mine.unit: [one.unit for one in all_methods], mine.per_layer: [one.per_layer for one in all_methods]}
    return next((one for one in same.get(key, ()) if one in keys), None)


_PYTHON = {
    "null": type(None),
    "bool": bool,
    "int": int,
    "float": (int, float),
    "str": str,
    "dict": dict,
    "any": object,
}


def _convert(key: str, value: Any, types: list[str], from_text: bool) -> Any:
    if isinstance(value, str) and value.startswith("{") and "dict" in types:  # as transformers takes it
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"`{key}: {value}` is no JSON ({error}). Write a mapping.") from None
    for kind in types:
        if _is(value, kind):
            return value
    if isinstance(value, str) and from_text:
        for kind in types:
            try:
                return _FROM_TEXT[kind](value)
            except (KeyError, ValueError):
                continue
    expected, hint = " or ".join(types), ""
    if isinstance(value, bool):
        hint = " YAML reads no, off, yes and on as booleans: write it in quotes."
    elif _is_one_of_a_list(value, types):
        hint = f" Write `{key}: [{value}]`."
    elif isinstance(value, str) and "float" in types:
        hint = " Write a number without quotes; YAML reads one such as 1e-4 as text, and 1.0e-4 as a number."
    raise ValueError(f"`{key}` must be {expected}; got {value!r} ({type(value).__name__}).{hint}")


def _is_one_of_a_list(value: Any, types: list[str]) -> bool:
    return any(kind.startswith("list") and _is([value], kind) for kind in types)


def _is(value: Any, kind: str) -> bool:
    if kind.startswith("list"):
        return isinstance(value, list) and all(_is(item, kind[5:-1]) for item in value)
    if isinstance(value, bool):
        return kind in ("bool", "any")
    return isinstance(value, _PYTHON[kind])


_YES_NO = {word: word in ("yes", "true", "t", "y", "1") for word in "yes true t y 1 no false f n 0".split()}
_FROM_TEXT = {
    "int": int,
    "float": float,
    "bool": lambda text: _YES_NO[text.lower()],
    "null": lambda text: {"none": None, "null": None}[text.lower()],
}
