"""Tables of the documentation that follow from the records of methods. Standard library only.

`python -m hf_rb.methods.tables docs/methods.md` (`make generated`) writes the page.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_rb.methods.metrics import ROUTER_METRICS, SHAPING_METRICS, TOKEN_METRICS, TRAINER_METRICS
from hf_rb.methods.record import Method, Metric, ObjectiveMethod
from hf_rb.methods.registry import PACKAGE, entries, methods
from hf_rb.utils.fields import default_of


__all__ = ["methods_page", "runs"]

_TRAINERS = ("GKD `lmbda: 0`", "GKD `0 < lmbda < 1`", "GKD `lmbda: 1`", "Distillation", "GKD with a teacher cache")
_KINDS = {
    "objective": ("Distillation objectives", "`objective: {key}` of `hf-rb gkd` and `hf-rb distillation`"),
    "shaper": ("Advantage shapers", "`advantage_shapers: [{key}]` of `hf-rb grpo`"),
    "trainer": ("Other methods of the trainers", "its flags"),
    "quantizer": ("Quantizers", "`quant_method: {key}`"),
    "merge": ("Merges", "`hf-rb merge --method {command}`"),
    "model": ("Models", "`apply_mpi`, or its model classes"),
}


def runs(method: ObjectiveMethod) -> tuple[bool, bool, bool, bool, bool]:
    """Says where an objective may run: GKD on the dataset's completions, on a mixture, on the student's; Distillation;
    GKD with a teacher cache.
    """
    given, drawn = method.completions != "student", method.completions != "dataset"
    return given, given and drawn, drawn, drawn, method.cached


def methods_page() -> str:
    """Returns the page of all methods of this package, as Markdown."""
    ours = [entry.method for entry in entries() if entry.package == PACKAGE]
    parts = ["# Methods", "", "This page follows from the records of the methods; `make generated` writes it."]
    for kind, (title, switch) in _KINDS.items():
        chosen = [method for method in ours if method.kind == kind]
        rows = [
            (f"{method.name}: {method.summary}", switch.format(**vars(method)), _paper(method)) for method in chosen
        ]
        parts += ["", f"## {title}", "", *_table(("method", "on by", "paper"), rows)]
    parts += ["", "## Where an objective may run", "", "Anything else raises, and the message says what to write.", ""]
    parts += _table(
        ("objective", *_TRAINERS),
        [
            (f"`{name}`", *("yes" if one else "raises" for one in runs(entry.method)))
            for name, entry in methods("objective").items()
            if entry.package == PACKAGE
        ],
    )
    parts += ["", "## Flags", ""]
    for method in ours:
        if method.flags:
            rows = [
                (f"`{one.name}`", f"`{default_of(one)!r}`", _limits(one), one.metadata["help"].replace("%%", "%"))
                for one in dataclasses.fields(method.flags)
            ]
            parts += [f"### {method.name}", "", *_table(("flag", "default", "values", "meaning"), rows), ""]
    parts += ["## Metrics", "", "In evaluation `eval_` stands before a name.", ""]
    parts += [*_metrics((*TRAINER_METRICS, *TOKEN_METRICS)), ""]
    parts += ["Of every shaper, behind `shaping/<key>/`:", "", *_metrics(SHAPING_METRICS), ""]
    parts += ["With `router_doctor`, means over the layers:", "", *_metrics(ROUTER_METRICS, "router/"), ""]
    for method in ours:
        if method.metrics:
            prefix = f"shaping/{method.key}/" if method.kind == "shaper" else ""
            parts += [f"### {method.name}", "", *_metrics(method.metrics, prefix), ""]
    return "\n".join(parts).rstrip() + "\n"


def _paper(method: Method) -> str:
    return f"[{method.paper.id}]({method.paper.url})" if method.paper else ""


def _limits(field: dataclasses.Field) -> str:
    choices = ", ".join(f"`{one}`" for one in field.metadata.get("choices", ()))
    return choices or field.metadata.get("range", "")


def _metrics(metrics: Iterable[Metric], prefix: str = "") -> list[str]:
    rows = []
    for one in metrics:
        names = [one.name, f"{one.name}_min", f"{one.name}_max"] if one.extremes else [one.name]
        better = "" if one.better == "neither" else one.better
        rows.append((", ".join(f"`{prefix}{name}`" for name in names), one.meaning, one.range, better))
    return _table(("metric", "meaning", "range", "better"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(methods_page(), encoding="utf-8")
