"""Rules for the fields of a quantization config. Standard library only: `hf-rb check` runs these without torch."""

import re
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any


__all__ = ["NSDS_RANGES", "d2quant_rules", "nsds_budget", "ptqtp_rules"]

# The least and the most sensitive layers get these (hf_rb/quantizers/allocation/nsds.py); the bits are those of the
# paper.
NSDS_RANGES = {"bits_per_layer": (2, 4), "planes_per_layer": (2, 3)}


def ptqtp_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of a [`PTQTPConfig`]."""
    yield from _pattern_rules(config, "planes_per_layer", '{"down_proj": 3}')
    planes_of = _items(config.planes_per_layer)
    for pattern, planes in planes_of.items():
        if type(planes) is not int or planes not in (1, 2, 3):
            yield f"`planes_per_layer[{pattern!r}]` must be 1, 2 or 3; got {planes!r}."
    mixed = isinstance(config.planes_per_layer, str) or {config.planes, *planes_of.values()} != {2}
    if config.scale_mode == "tied" and mixed:
        yield "`scale_mode='tied'` ties two scales: use it with `planes=2` and without other `planes_per_layer`."


# Fields that act only where another one has a certain value, with the defaults that are silent elsewhere.
_ACTS_ONLY = {
    "asym_alpha": (0.25, "backend", ("gptaq",)),
    "percdamp": (0.01, "backend", ("gptaq", "gptq")),
    "act_order": ("gar", "backend", ("gptaq", "gptq")),
    "dsq_iters": (15, "dsq", (True,)),
    "dsq_weighting": ("hessian", "dsq", (True,)),
    "dac_mode": ("fold", "dac", (True,)),
    "dac_clip": (10.0, "dac", (True,)),
    "dac_final": (True, "dac", (True,)),
    "rotation_block": ("auto", "rotate", ("block_hadamard",)),
    "rotation_seed": (0, "rotate", ("block_hadamard",)),
}


def d2quant_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of a [`D2QuantConfig`]."""
    yield from _pattern_rules(config, "bits_per_layer", '{"down_proj": 3}')
    for pattern, bits in _items(config.bits_per_layer).items():
        if type(bits) is not int or bits not in (2, 3, 4):
            yield f"`bits_per_layer[{pattern!r}]` must be 2, 3 or 4; got {bits!r}."
    block = config.rotation_block
    if block != "auto" and not (type(block) is int and block > 0 and block & (block - 1) == 0):
        yield f"`rotation_block` must be 'auto' or a power of two such as 64; got {block!r}."
    for name, (default, other, values) in _ACTS_ONLY.items():
        if other in ("dac", "rotate") and config.backend == "rtn":  # which has neither, whatever the config says
            other, values = "backend", ("gptaq", "gptq")
        if getattr(config, name) != default and getattr(config, other) not in values:
            needed = " or ".join(f"`{other}={value!r}`" for value in values)
            yield f"`{name}={getattr(config, name)!r}` cannot act: it needs {needed}."
    data = config.dataset
    if isinstance(data, Sequence) and not isinstance(data, str):
        if not data or not all(isinstance(text, str) for text in data):
            yield (
                "`dataset` as a list must hold texts, at least one; an item that is no `str`, or none at all, was "
                "found."
            )
    elif not isinstance(data, (str, NoneType)):
        yield f"`dataset` must be a name, a file or a list of texts; got {type(data).__name__}."
    if data in (None, "") and config.backend != "rtn" and not config.dequantize:
        yield (
            f"D²Quant with `backend={config.backend!r}` needs calibration text: write `dataset='texts.jsonl'`, a "
            "dataset of the Hub or a list of texts; or `backend='rtn'`, which needs none."
        )


def nsds_budget(strategy: str) -> float | None:
    """Returns 3.0 for `"nsds:3.0"`, `None` for anything else."""
    found = re.fullmatch(r"nsds:(\d+(?:\.\d+)?)", strategy)
    return float(found[1]) if found else None


def _pattern_rules(config: Any, per_layer: str, example: str) -> Iterator[str]:
    """Yields what is wrong with `modules_to_not_convert` and with the dict `per_layer`, both of which name modules."""
    skipped, values = config.modules_to_not_convert, getattr(config, per_layer)
    if isinstance(skipped, str):
        yield f"`modules_to_not_convert` must be a list; got {skipped!r}, so write [{skipped!r}]."
    if not isinstance(skipped, (list, tuple, NoneType)):
        yield f"`modules_to_not_convert` must be a list of names; got {skipped!r}."
    if isinstance(values, str):
        low, high = NSDS_RANGES[per_layer]
        if (budget := nsds_budget(values)) is None or not low <= budget <= high:
            yield (
                f"`{per_layer}` as text must be 'nsds:' and an average from {low} to {high}, such as "
                f"'nsds:{(low + high) / 2}'; got {values!r}."
            )
    elif not isinstance(values, (dict, NoneType)):
        yield f"`{per_layer}` must be a dict such as {example}; got {values!r}."
    skipped = skipped if isinstance(skipped, (list, tuple)) else ()
    for name, patterns in (("modules_to_not_convert", skipped), (per_layer, _items(values))):
        yield from (problem for pattern in patterns if (problem := _pattern_problem(name, pattern)))


def _pattern_problem(name: str, pattern: Any) -> str | None:
    if not isinstance(pattern, str):
        return f"`{name}` has {pattern!r}; expected the name of a module, an ending or a regular expression."
    try:
        re.compile(f"(?:{pattern})")
    except re.error as error:
        hint = f"write {pattern.strip('*.')!r} for whatever ends so" if pattern.startswith("*") else "`.*` is any text"
        return f"`{name}` has {pattern!r}, which is no regular expression ({error.msg}); {hint}."


def _items(values: Any) -> dict:
    return values if isinstance(values, dict) else {}
