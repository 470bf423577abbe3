"""Runs a merge by its record: [`merge_models`], and the functions of single merges, which are made from it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hf_rb.io.model_folder import find_model
from hf_rb.utils.fields import default_of, parameters
from hf_rb.weights.adapters import is_adapter
from hf_rb.weights.engine import merge
from hf_rb.weights.operation import Operation, Request
from hf_rb.weights.options import Model, Options, arguments, check_models, merges
from hf_rb.weights.report import MergeReport
from hf_rb.weights.source import Source


__all__ = ["documented_merge", "merge_models"]

Function = TypeVar("Function", bound=Callable)
FOLDER = "    destination (`str` or `Path`):\n        Folder to write; of a sweep, a folder of folders."


def merge_models(
    method: str | type[Operation],
    models: Mapping[str, Model | Sequence[Model] | None],
    destination: Model,
    **options: Any,
) -> MergeReport:
    """
    Makes a model, or an adapter, from models, with the memory of a few pieces of a tensor, or as much as the method
    needs for one tensor.

    The folder appears at `destination` in one step when it is complete. Until then the work lies beside it in a hidden
    folder, from which the same call goes on after it was interrupted or killed.

    Args:
        method (`str` or subclass of [`~hf_rb.weights.operation.Operation`]):
            What `hf-rb merge --method` calls it, or its class.
        models (`Mapping[str, str | Path | Sequence[str | Path]]`):
            Embedded models (`"tiny:student"`), folders or Hub ids, by role; a list where a role has several.
        destination (`str` or `Path`):
            Folder to write; of a sweep, the folder of the folders `lambda-0.2`, ….
        **options:
            Flags of the method, and fields of [`~hf_rb.weights.options.Options`].

    Returns:
        [`MergeReport`]; without tensors for an adapter that was copied as it is.

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model, or a shard is missing.
        TypeError: The method has no such option.
        ValueError: The models do not fit together, an option is out of range, a pattern means nothing, a weight is
            NaN, or the unfinished work is another one.

    Example:

    ```python
    >>> merge_models("ties", {"base": "base", "tuned": ["one", "two"]}, "merged", density=0.2, files_from="base")
    ```
    """
    if isinstance(method, str):
        known = merges()
        if method not in known:
            raise ValueError(f"There is no merge {method!r}; the merges are {', '.join(known)}.")
        method = known[method].load()
    record, shared = method.method, {field.name for field in fields(Options)}
    check_models(record, models)
    operation = method(**{name: value for name, value in options.items() if name not in shared})
    asked = Options(**{name: value for name, value in options.items() if name in shared})
    names: dict[str, str] = {}
    for role in sorted(record.models, key=lambda role: role != record.receiver):  # which comes first
        if isinstance(given := models.get(role), list | tuple):
            names |= {f"{role} {number}": str(name) for number, name in enumerate(given, start=1)}
        elif given:
            names[role] = str(given)
    folders = {role: find_model(names[role], adapter=True) for role in record.adapters if role in names}
    adapters = {role: folder for role, folder in folders.items() if is_adapter(folder)}
    request = Request(names, adapters, Path(destination), asked)
    _check_adapters(operation, request)
    if adapters:
        done = operation.of_adapters(request)
        if isinstance(done, MergeReport):
            return done
        operation = done
    sources = [Source(role, name) for role, name in names.items() if role not in adapters]
    return merge(operation, sources, destination, asked)


def _check_adapters(operation: Operation, request: Request) -> None:
    """Raises `ValueError` for roles and flags that go with models alone, or with adapters alone."""
    method, names = operation.method, request.models
    if request.adapters:
        if idle := [role for role in method.optional if role in names]:
            raise ValueError(f"An adapter holds its delta: leave out `{idle[0]}` (`--{idle[0]}`).")
        return
    model = " and ".join(names[role] for role in method.adapters if role in names)
    for name in set(method.for_adapters) & {*operation.changed()}:
        raise ValueError(
            f"{model} is a model, not an adapter: leave out `{name}` (`--{name.replace('_', '-')}`), which is for "
            "adapters."
        )
    for role in method.optional:
        if role not in names:
            raise ValueError(
                f"{model} is a model, not an adapter: give {method.models[role]} as well, `{role}=...` "
                f"(`--{role} MODEL`)."
            )


def documented_merge(operation: type[Operation]) -> Callable[[Function], Function]:
    """Gives the function of a merge the signature and the docstring of its record: models, flags and [`Options`], the
    last two of which it takes as `**options`.
    """
    record, options = operation.method, arguments(operation.method)
    optional = {role: ", *optional*" * (role in record.optional) for role in record.models}
    models = [f"    {role} (`str` or `Path`{optional[role]}):\n        {record.models[role]}." for role in optional]

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = {name: one for name, one in signature.parameters.items() if one.kind is not one.VAR_KEYWORD}
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default_of(field), annotation=field.type)
            for name, field in options.items()
            if name not in own
        ]
        function.__signature__ = signature.replace(parameters=[*own.values(), *more])  # type: ignore[attr-defined]
        text, flags = inspect.cleandoc(function.__doc__ or ""), parameters(options.values())
        lines = [text, "", "Args:", *models, FOLDER, flags, "", "Returns and raises:", "    As [`merge_models`]."]
        function.__doc__ = "\n".join(lines)
        return function

    return decorate
