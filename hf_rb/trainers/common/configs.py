"""Base of our configs; a config of TRL's, or a user's subclass of one, in the place of one of ours."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedModel, TrainingArguments

from hf_rb.methods.recipes import KEYS, flatten, foreign
from hf_rb.trainers.common.below import ConfigBelow
from hf_rb.utils.fields import Rule, default_of, validate


__all__ = ["ConfigMixin", "own_config", "with_flags_of"]


class ConfigMixin(ConfigBelow):
    """Comes first among the bases of a config, and TRL's config last. What it refuses stands in `_rules`."""

    _rules: ClassVar[tuple[Rule, ...]] = ()

    def __post_init__(self) -> None:
        self._take_flags_of_methods()
        super().__post_init__()
        validate(self, *self._rules)

    def _take_flags_of_methods(self) -> None:
        """Turns a mapping, as in `advantage_shapers=[{"edas": {"alpha": 0.3}}]`, into names and fields. The config
        gets the fields of methods of other packages too.
        """
        values = flatten({key: getattr(self, key) for key in KEYS if hasattr(self, key)})
        known = _defaults(type(self))
        for name, value in values.items():
            if name not in KEYS and getattr(self, name, value) not in (value, known.get(name)):
                raise ValueError(f"`{name}` is given twice, {getattr(self, name)!r} and {value!r}. Remove one.")
        wider = with_flags_of(type(self), values)
        if wider is not type(self):
            self.__class__ = wider
            vars(self).update(_defaults(wider) | vars(self))
        vars(self).update(values)


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
        own = _restore((config_class, type(args)), type(args), _defaults(config_class) | vars(args))
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
    known = {field.name: default_of(field) for field in fields(config_class)}
    return {name: default for name, default in known.items() if default is not MISSING}


def with_flags_of(config_class: type[Config], values: Mapping[str, Any]) -> type[Config]:
    """Returns a config class that also has the flags of those methods of other packages that values name."""
    names = {field.name for field in fields(config_class)}
    found = foreign(values, names) if names & KEYS.keys() else []
    return _joined((config_class, *(entry.load().method.flags for entry in found)), config_class)


def _restore(bases: tuple[type, ...], named: type, state: dict[str, Any]) -> Any:
    own = object.__new__(_joined(bases, named))
    vars(own).update(state)
    return own


@cache
def _joined(bases: tuple[type, ...], named: type) -> Any:
    """Returns a class of several bases, under the name of one of them; the first if it has all the others."""
    if issubclass(bases[0], bases[1:]) or len(bases) == 1:
        return bases[0]

    def reduce(self: Any) -> tuple[Callable, tuple]:  # trainers pickle their config, and no module has this class
        return _restore, (bases, named, vars(self))

    names = {"__reduce__": reduce, "__module__": named.__module__, "__qualname__": named.__qualname__}
    return dataclass(repr=False, eq=False)(type(named.__name__, bases, names))
