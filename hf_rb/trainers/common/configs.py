"""Takes a config of TRL, or a user's subclass of one, for the config of one of our trainers."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, TypeVar

from transformers import PreTrainedModel, TrainingArguments

from hf_rb.utils.fields import validate


__all__ = ["own_config"]

Config = TypeVar("Config", bound=TrainingArguments)


def own_config(
    config_class: type[Config], args: TrainingArguments | None, model: str | PreTrainedModel, suffix: str
) -> Config:
    """
    Returns `args` as our config class. Where `args` is TRL's or missing, our flags are off.

    The last base of `config_class` is TRL's config, and its `_rules` say what it refuses. A config that a user derives from TRL's
    keeps its class and its fields: the result is an instance of both classes, with the values of `args` as they are.

    Raises:
        TypeError: `args` is a config of another trainer.
        ValueError: A value of TRL's that our trainer refuses.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return config_class(f"{name.split('/')[-1]}-{suffix}")
    if isinstance(args, config_class):
        return args
    if isinstance(args, config_class.__bases__[-1]):
        # Not through the constructor: it would derive values again that `args` has derived already.
        own = _restore(config_class, type(args), _flags_off(config_class) | vars(args))
        validate(own, *config_class._rules)
        return own
    # Not `args.to_dict()`, which replaces the value of every field called `..._token`, `eos_token` too.
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    unknown = sorted(values.keys() - {field.name for field in fields(config_class)})
    if unknown:
        raise TypeError(
            f"`args` is a {type(args).__name__}, whose `{unknown[0]}` this trainer does not have. Pass a {config_class.__name__}, or "
            f"derive {type(args).__name__} from it."
        )
    return config_class(**values)


def _flags_off(config_class: type[TrainingArguments]) -> dict[str, Any]:
    return {
        field.name: field.default if field.default is not MISSING else field.default_factory()
        for field in fields(config_class)
        if field.default is not MISSING or field.default_factory is not MISSING
    }


def _restore(ours: type[Config], given: type[TrainingArguments], state: dict[str, Any]) -> Config:
    own = object.__new__(_joined(ours, given))
    vars(own).update(state)
    return own


@cache
def _joined(ours: type[Config], given: type[TrainingArguments]) -> type[Config]:
    """Returns a class that is both, under the name of the given one; ours if it is both already."""
    if issubclass(ours, given):
        return ours

    def reduce(self: Any) -> tuple[Callable, tuple]:  # trainers pickle their config, and no module has this class
        return _restore, (ours, given, vars(self))

    names = {"__reduce__": reduce, "__module__": given.__module__, "__qualname__": given.__qualname__}
    return dataclass(repr=False, eq=False)(type(given.__name__, (ours, given), names))
