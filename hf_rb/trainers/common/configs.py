"""Base of our configs; a config of TRL's, or a user's subclass of one, in the place of one of ours."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedModel, TrainingArguments

from hf_rb.trainers.common.below import ConfigBelow
from hf_rb.utils.fields import Rule, validate


__all__ = ["ConfigMixin", "own_config"]


class ConfigMixin(ConfigBelow):
    """Comes first among the bases of a config, and TRL's config last. What it refuses stands in `_rules`."""

    _rules: ClassVar[tuple[Rule, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, *self._rules)


Config = TypeVar("Config", bound=ConfigMixin)


def own_config(
    config_class: type[Config], args: TrainingArguments | None, model: str | PreTrainedModel, suffix: str
) -> Config:
    """
    Returns `args` as our config class. Where `args` is TRL's or missing, our flags are off.

    A config that a user derives from TRL's keeps its class and its fields: the result is an instance of both classes,
    with the values of `args` as they are. A config of another trainer is none of these, also where TRL derives it from
    this trainer's, as `GKDConfig` from `SFTConfig`.

    Raises:
        TypeError: `args` is a config of another trainer.
        ValueError: A value of TRL's that our trainer refuses.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return config_class(f"{name.split('/')[-1]}-{suffix}")
    if isinstance(args, config_class):
        return args
    library_class = _library_class(type(args))
    if library_class is config_class.__bases__[-1]:
        # Not through the constructor: it would derive values again that `args` has derived already.
        own = _restore(config_class, type(args), _defaults(config_class) | vars(args))
        validate(own, *config_class._rules)
        return own
    # Not `args.to_dict()`, which replaces the value of every field called `..._token`, `eos_token` too.
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    unknown = sorted(values.keys() - {field.name for field in fields(config_class)})
    if unknown:
        kind, wanted = type(args).__name__, config_class.__name__
        remedy = f"Pass a {wanted}, or derive your config from it."
        if library_class is not None and (library_class is type(args) or issubclass(library_class, ConfigMixin)):
            method = library_class.__name__.removesuffix("Config").removesuffix("Arguments")
            remedy = f"Use `{method}Trainer`, or pass a {wanted}."
        raise TypeError(f"`args` is a {kind}, whose `{unknown[0]}` this trainer does not have. {remedy}")
    return config_class(**values)


def _library_class(kind: type) -> type | None:
    """Returns the config of ours or of TRL's that a class is or derives from, `None` for one of transformers alone."""
    libraries = (one for one in kind.__mro__ if one.__module__.partition(".")[0] in ("hf_rb", "trl"))
    return next((one for one in libraries if issubclass(one, TrainingArguments)), None)


def _defaults(config_class: type[ConfigMixin]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(config_class):
        if field.default is not MISSING:
            found[field.name] = field.default
        elif field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
    return found


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
