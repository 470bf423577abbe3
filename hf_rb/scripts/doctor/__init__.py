"""Versions and verdicts of `hf-rb doctor`, in under a minute, offline."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

from hf_rb.scripts.doctor import behaviours
from hf_rb.scripts.doctor.environment import environment
from hf_rb.scripts.doctor.verdicts import Verdict, examine
from hf_rb.utils import compat, import_hooks, versions


__all__ = ["environment", "examination"]


def examination() -> Iterator[Verdict]:
    """Yields verdicts as they are found, and stops at a version that is not supported or a part that does not
    import.
    """
    for group, name, check in (
        ("versions", "ranges of transformers, TRL, PEFT and accelerate", versions.check_versions),
        ("imports", "the libraries", lambda: _import("torch", *versions.RANGES)),
    ):
        yield (verdict := examine(group, name, check))
        if verdict.state == "failed":
            return
    names = [examine("names", name, lambda name=name: behaviours.check_parameters(name)) for name in compat.TABLE]
    yield from (verdict for verdict in names if verdict.state == "failed")
    yield (imported := examine("imports", "every part of the package", lambda: _import(f"{__name__}.trials")))
    if imported.state == "failed":
        return
    for library in ("transformers", "peft"):
        yield examine(
            "registration", f"registered with {library}", lambda library=library: import_hooks.require(library)
        )

    from hf_rb.scripts.doctor import trials

    for group, found in (
        ("quantization", trials.quantization_trials()),
        ("adapters", trials.adapter_trials()),
        ("training", trials.training_trials()),
    ):
        for name, check in found:
            yield examine(group, name, check)
    for behaviour in behaviours.behaviours():
        verdict = examine("behaviour", behaviour.sentence, behaviour.check)
        of_names = f" (in the table as {', '.join(behaviour.names)})" if verdict.state == "failed" else ""
        yield replace(verdict, detail=verdict.detail + of_names)


def _import(*modules: str) -> None:
    for module in modules:
        import_module(module)
