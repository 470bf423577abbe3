"""Versions and findings of `hf-rb doctor`, in under a minute, offline."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

from hf_rb.scripts.doctor import behaviours
from hf_rb.scripts.doctor.environment import environment
from hf_rb.scripts.doctor.findings import Finding, finding_of
from hf_rb.utils import compat, import_hooks, versions


__all__ = ["environment", "examination"]


def examination() -> Iterator[Finding]:
    """Yields findings one by one, and stops at a version that is not supported or a part that does not
    import.
    """
    for group, name, check in (
        ("versions", "ranges of transformers, TRL, PEFT and accelerate", versions.check_versions),
        ("imports", "the libraries", lambda: _import("torch", *versions.RANGES)),
    ):
        yield (finding := finding_of(group, name, check))
        if finding.state == "failed":
            return
    names = [finding_of("names", name, lambda name=name: behaviours.check_parameters(name)) for name in compat.TABLE]
    yield from (finding for finding in names if finding.state == "failed")
    yield (imported := finding_of("imports", "every part of the package", lambda: _import(f"{__name__}.trials")))
    if imported.state == "failed":
        return
    for library in ("transformers", "peft"):
        yield finding_of(
            "registration", f"registered with {library}", lambda library=library: import_hooks.require(library)
        )

    from hf_rb.scripts.doctor import trials

    for group, found in (
        ("quantization", trials.quantization_trials()),
        ("adapters", trials.adapter_trials()),
        ("training", trials.training_trials()),
    ):
        for name, check in found:
            yield finding_of(group, name, check)
    for behaviour in behaviours.behaviours():
        finding = finding_of("behaviour", behaviour.sentence, behaviour.check)
        of_names = f" (in the table as {', '.join(behaviour.names)})" if finding.state == "failed" else ""
        yield replace(finding, detail=finding.detail + of_names)


def _import(*modules: str) -> None:
    for module in modules:
        import_module(module)
