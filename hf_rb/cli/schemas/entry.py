"""One key of a schema, from what a config class says of a field, and from what is known of fields of the libraries."""

from collections.abc import Collection
from typing import Any


__all__ = ["TYPE_NAMES", "make_entry"]

TYPE_NAMES = {type(None): "null", bool: "bool", int: "int", float: "float", str: "str", dict: "dict"}

# Ranges of the libraries' own fields, which they check nowhere, or after models are loaded.
_RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "generation_batch_size",
            "steps_per_generation",
            "num_iterations",
            "num_generations_eval",
            "max_length",
            "max_completion_length",
            "max_new_tokens",
            "save_total_limit",
            "lora_r",
            "lora_alpha",
        ),
        "[1, inf)",
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "temperature", "test_split_size"), "(0, inf)"),
    **dict.fromkeys(
        ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "eval_steps", "dataloader_num_workers"),
        "[0, inf)",
    ),
    **dict.fromkeys(("lora_dropout", "label_smoothing_factor"), "[0, 1)"),
    "lmbda": "[0, 1]",
    "max_steps": "[-1, inf)",  # -1: as many as the epochs have
    "num_generations": "[2, inf)",
    "top_p": "(0, 1]",
}
# transformers computes these from its loggers' levels.
_LEVELS = ["detail", "debug", "info", "warning", "error", "critical", "passive"]
_CHOICES = {"log_level": _LEVELS, "log_level_replica": _LEVELS}
# Typed as text, and TRL and transformers take booleans.
_ALSO_BOOLEAN = {"resume_from_checkpoint", "scale_rewards"}


def make_entry(
    name: str,
    types: Collection[str],
    *,
    choices: Collection[Any] | None = None,
    range: str | None = None,
    help: str = "",
    keys: dict[str, Any] | None = None,
    own: bool = False,
    **default: Any,
) -> dict[str, Any]:
    """
    Returns the entry of a field.

    Args:
        name (`str`):
            Name of the field.
        types (`Collection[str]`):
            Names of its types: those of `TYPE_NAMES`, `any`, or `list[...]` of one.
        choices (`Collection`, *optional*):
            Values that it may have.
        range (`str`, *optional*):
            Interval that it is in.
        help (`str`, *optional*, defaults to `""`):
            Help, as argparse wants it.
        keys (`dict`, *optional*):
            Entries of the dataclass that its list holds.
        own (`bool`, *optional*, defaults to `False`):
            Whether the field is ours.
        default (*optional*):
            Its default. A field without one must be given.
    """
    kinds = set(types)
    if "default" in default and default["default"] is None:  # transformers has fields typed `str` with this default
        kinds.add("null")
    entry = {
        "types": sorted(kinds) + ["bool"] * (name in _ALSO_BOOLEAN),
        **default,
        "choices": list(choices or _CHOICES.get(name, ())) or None,
        "range": range or _RANGES.get(name),
        "help": help.replace("%%", "%"),
        "keys": keys,
        "own": own or None,
    }
    return {key: value for key, value in entry.items() if value is not None or key == "default"}
