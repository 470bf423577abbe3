"""Checks of the names in `hf_rb.utils.compat` by behaviour, each on something small.

Every name of `compat.TABLE` and `compat.ATTRIBUTES` is tried by one function at least, which raises where the
installed library does something else. `hf-rb doctor` runs all of them, and `tests/test_compat.py` one a test.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from hf_rb.scripts.doctor.findings import Skipped
from hf_rb.utils import compat


__all__ = ["Behaviour", "behaviours", "Recorded", "check_parameters", "relies_on"]

_MODULES = ("loading", "models", "adapters", "training", "trainers")
_FOUND: list["Behaviour"] = []


class Behaviour(NamedTuple):
    """A check of names by behaviour.

    Attributes:
        names (`tuple[str, ...]`): Names of `compat.TABLE` and `compat.ATTRIBUTES`.
        sentence (`str`): Description of the behaviour.
        check (`Callable`): Raises where the installed library does something else.
    """

    names: tuple[str, ...]
    sentence: str
    check: Callable[[], None]


def relies_on(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a function as the check of some names; the first paragraph of its docstring says the behaviour."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        sentence = " ".join(str(check.__doc__).split("\n\n")[0].split()).rstrip(".")
        _FOUND.append(Behaviour(names, sentence, check))
        return check

    return register


def behaviours() -> list[Behaviour]:
    """Returns all checks; imports the libraries."""
    for module in _MODULES:
        import_module(f"{__name__}.{module}")
    return list(_FOUND)


def check_parameters(name: str) -> None:
    """
    Checks that a name of `compat.TABLE` is there and takes the parameters that we pass.

    Raises:
        ImportError: It is gone.
        RuntimeError: It no longer takes a parameter.
        Skipped: TRL has removed an experimental module, for which we have functions of our own.
    """
    if compat.is_removed(name):
        raise Skipped(f"This TRL has no {compat.TABLE[name].module}; functions of hf_rb take its place.")
    entry, value = compat.TABLE[name], compat.resolve(name)
    if missing := set(entry.parameters) - set(inspect.signature(value).parameters if entry.parameters else ()):
        raise RuntimeError(f"{entry.module}.{entry.attribute} no longer takes {', '.join(sorted(missing))}.")


class Recorded:
    """Notes the arguments and the results of a method of a class while it is entered, and changes neither.

    Attributes:
        calls (`list[tuple[dict, Any]]`): Arguments by name, and the result, of each call.
    """

    def __init__(self, owner: type, name: str):
        self.owner, self.name, self.calls = owner, name, []

    def __enter__(self) -> "Recorded":
        # Read without binding: a static method must stay one.
        self.original = inspect.getattr_static(self.owner, self.name)
        self.is_own = self.name in vars(self.owner)
        function = getattr(self.owner, self.name)
        signature = inspect.signature(function)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.calls.append((dict(signature.bind(*args, **kwargs).arguments), result))
            return result

        setattr(self.owner, self.name, staticmethod(recorded) if isinstance(self.original, staticmethod) else recorded)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.is_own:
            setattr(self.owner, self.name, self.original)
        else:
            delattr(self.owner, self.name)
