"""Models, flags and options of merges, and their checks. Standard library only: `hf-rb merge` reads this before torch
is imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_rb.methods import MergeMethod, flag
from hf_rb.methods.registry import Entry, broken, methods
from hf_rb.utils.dtypes import WEIGHT_TYPES
from hf_rb.utils.fields import described, validate, value_problem


__all__ = [
    "Extrapolating",
    "Lambdas",
    "Model",
    "Options",
    "arguments",
    "check_lambdas",
    "check_models",
    "lambda_flag",
    "merges",
    "records",
    "unusable",
]

Model = str | Path
Lambdas = float | Sequence[float]
"""Type of the flag `lam`, `--lambda`: one model, or a sweep of several."""


def lambda_flag(default: float, help: str, limits: str = "[0, 1]") -> Any:
    """Returns the flag `lam` of a merge, which [`check_lambdas`] checks. `limits` is an interval."""
    text = f"{help}, in {limits}; several for a sweep."
    return field(default=default, metadata=dict(described(text)) | {"limits": limits})


@dataclass
class Extrapolating:
    """The flag of a merge that makes sense beyond its ends."""

    extrapolate: bool = flag(
        False,
        "Whether lambdas outside [0, 1] are meant; on the command line, a negative one after an equals sign, "
        "`--lambda=-0.5,0`.",
    )


@dataclass(frozen=True)
class Options:
    """Options of every merge, beside its own flags."""

    include: str | None = flag(
        None,
        "Tensors to change: all, linear, attn, mlp, embed, head, norm, router, layers:0-11 or a regular expression.",
    )
    mismatch: str = flag(
        "refuse",
        "What happens to tensors that one model lacks or that have other shapes, and to embeddings of another "
        "vocabulary: `refuse` them, or `skip` them, which keeps them as they are.",
        choices=("refuse", "skip"),
    )
    files_from: str | None = flag(
        None,
        "Whose configuration, tokenizer, chat template and generation config the result gets. Must be said where they "
        "differ.",
    )
    dtype: str | None = flag(
        None, "Type of all floating tensors. By default that of the models.", choices=tuple(WEIGHT_TYPES)
    )
    overwrite: bool = flag(False, "Whether to replace a folder that is not empty.")
    resume: bool = flag(True, "Whether to go on with what an interrupted call has left; otherwise it is thrown away.")
    progress: bool = flag(True, "Whether to show a progress bar, on a terminal.")

    def __post_init__(self) -> None:
        validate(self)


def arguments(method: MergeMethod) -> dict[str, Field]:
    """Returns the flags of a merge, and those of [`Options`] that act on it, by name."""
    own = fields(method.flags) if method.flags else ()
    shared = [field for field in fields(Options) if field.name != "files_from" or len(method.files_from) > 1]
    return {field.name: field for field in (*own, *shared)}


def merges() -> dict[str, Entry]:
    """Returns the merges by what `hf-rb merge --method` calls them: ours, and those of installed packages."""
    return _sorted()[0]


def unusable() -> dict[str, str]:
    """Returns the problems of those merges of other packages that cannot be used, by name."""
    return _sorted()[1]


def _sorted() -> tuple[dict[str, Entry], dict[str, str]]:
    found, problems = {}, dict(broken("merge"))
    taken = ("method", "destination", "json", "debug", "help", "rule", *(one.name for one in fields(Options)))
    kinds: dict[str, Any] = dict.fromkeys(taken)
    for key, entry in methods("merge").items():
        method: MergeMethod = entry.method
        own = {field.name: field.type for field in fields(method.flags)} if method.flags else {}
        own |= dict.fromkeys(method.models, Model)
        clash = [name for name, kind in own.items() if kinds.get(name, kind) != kind]
        if clash:
            problems[method.command] = (
                f"The merge {method.command!r} of the package {entry.package} cannot be used: `{clash[0]}` is an "
                "argument of another kind. Rename its flag or role, or uninstall that package."
            )
            continue
        kinds |= own
        found[key if method.command in found else method.command] = entry
    return found, problems


def records() -> dict[str, MergeMethod]:
    """Returns the records of [`merges`]."""
    return {command: entry.method for command, entry in merges().items()}


def check_models(method: MergeMethod, models: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless every role that a merge needs is given: one model, or two and more."""
    given = {role for role, model in models.items() if model}
    if unknown := sorted(given - method.models.keys()):
        raise ValueError(f"--method {method.command} takes no {', '.join(f'--{role}' for role in unknown)}.")
    if missing := [role for role in method.models if role not in given and role not in method.optional]:
        raise ValueError(f"--method {method.command} needs {' and '.join(f'--{role} MODEL' for role in missing)}.")
    for role in given:
        count = len(models[role]) if isinstance(models[role], list | tuple) else 1
        if role in method.several and count < 2:
            raise ValueError(f"--method {method.command} needs two or more --{role} MODEL; only one is given.")
        if role not in method.several and count > 1:
            raise ValueError(f"--method {method.command} takes one --{role} MODEL; {count} are given.")


def check_lambdas(lam: Lambdas, limits: str = "[0, 1]", extrapolate: bool | None = False) -> tuple[float, ...]:
    """Returns the lambdas as a tuple.

    Raises:
        ValueError: There is none, two are equal, or one is outside the limits and not meant to be: `extrapolate` is
            `False`, or `None` for a merge without that flag.
    """
    lams = (lam,) if isinstance(lam, int | float) else tuple(lam)
    if not lams or len({f"{value:g}" for value in lams}) < len(lams):
        raise ValueError(f"`lam` is {lam!r}: give one value, or several different ones for a sweep.")
    for value in lams:
        if not float("-inf") < value < float("inf"):
            raise ValueError(f"lambda is {value}; write a number in {limits}.")
        if not extrapolate and value_problem("lam", value, range=limits):
            problem = f"lambda is {value}, which is outside {limits}"
            if extrapolate is None:
                raise ValueError(f"{problem}. Write a value in it.")
            raise ValueError(
                f"{problem} and extrapolates. Write a value in {limits}, or say that it is meant with "
                "`extrapolate=True` (`--extrapolate`)."
            )
    return lams
