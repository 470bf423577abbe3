"""`hf-rb merge`: makes models from models, without training."""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from hf_rb.io.model_folder import find_model
from hf_rb.methods.registry import catalog
from hf_rb.utils.output import json_text
from hf_rb.weights.options import Lambdas, Options, check_models, records, unusable


if TYPE_CHECKING:
    from hf_rb.weights import MergeReport

EXAMPLE = """hf-rb merge --method linear --start Qwen/Qwen3-4B-Instruct-2507 --end Qwen/Qwen3-4B-Thinking-2507 \\
      --lambda 0.4,0.6,0.8 --files-from end outputs/interpolated
  hf-rb merge --method graft --base Qwen/Qwen3-4B-Base --tuned outputs/tuned-base --onto Qwen/Qwen3-4B outputs/grafted
  hf-rb merge --method graft --tuned outputs/adapter-of-base --onto Qwen/Qwen3-4B outputs/grafted
  hf-rb merge --method timber --base Qwen/Qwen3-4B-Base --model Qwen/Qwen3-4B --lambda 0.2 outputs/refined"""


def configure(parser: argparse.ArgumentParser) -> None:
    methods = records()
    names = "; ".join(f"{command}: {method.name}" for command, method in methods.items())
    parser.add_argument("--method", type=_method, choices=list(methods), required=True, help=names)
    parser.add_argument("destination", metavar="DEST", help="folder to write; of several lambdas, a folder of folders")
    roles: Helps = defaultdict(lambda: defaultdict(list))
    flags: Helps = defaultdict(lambda: defaultdict(list))
    kinds: dict[str, Field] = {}
    for command, method in methods.items():
        for role, help in method.models.items():
            roles[role][help + (" (two or more times)" if role in method.several else "")].append(command)
        for field in fields(method.flags) if method.flags else ():
            kinds.setdefault(field.name, field)
            flags[field.name][_help(field)].append(command)
    models = parser.add_argument_group("models: tiny:student, a folder or a Hub id")
    for role, helps in roles.items():
        models.add_argument(_option(role), dest=role, metavar="MODEL", action="append", help=_of_methods(helps))
    for name, field in kinds.items():
        parser.add_argument(_option(name), dest=name, help=_of_methods(flags[name]), **_argument(field))
    for field in fields(Options):
        given, help = _argument(field), _help(field)
        if field.name == "files_from":
            several = [method.files_from for method in methods.values() if len(method.files_from) > 1]
            given["choices"] = list(dict.fromkeys(role for roles in several for role in roles))
        if field.name == "include":
            patterns: dict[str, list[str]] = defaultdict(list)
            for command, method in methods.items():
                patterns[method.include].append(command)
            defaults = [f"{pattern} with {', '.join(of)}" for pattern, of in patterns.items()]
            help += f" (default: {'; '.join(defaults)})"
        parser.add_argument(_option(field.name), dest=field.name, help=help, **given)
    parser.add_argument("--json", action="store_true", help="print the report, tensor by tensor, as JSON")


Helps = dict[str, dict[str, list[str]]]
"""For each argument its help, and the methods of which that is the help."""


def _of_methods(helps: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(methods)}: {help.rstrip('.')}" for help, methods in helps.items())


def _help(field: Field) -> str:
    text = field.metadata["help"].rstrip(".")
    default = None if field.default is MISSING else field.default
    default = ("yes" if default else "no") if isinstance(default, bool) else default
    limits = f", in {field.metadata['range']}" if "range" in field.metadata else ""
    return text[0].lower() + text[1:] + limits + ("" if default is None else f" (default: {default})")


def _option(name: str) -> str:
    # `lambda` is a word of Python; what may be given several times stands for one of them.
    return "--" + {"lam": "lambda", "rules": "rule"}.get(name, name.replace("_", "-"))


def _argument(field: Field) -> dict[str, Any]:
    """Keywords of `add_argument` for a flag. All defaults are `None`, so that a flag of another method is noticed."""
    types = [kind for kind in get_args(field.type) or [field.type] if kind is not NoneType]
    if bool in types:
        return {"action": argparse.BooleanOptionalAction}
    if field.type == Lambdas:
        return {"type": _lambdas, "metavar": "X[,X...]"}
    if field.type == dict[str, float]:
        return {"type": _rule, "action": "append", "metavar": "PATTERN=X"}
    return {"type": types[0]} | ({"choices": field.metadata["choices"]} if "choices" in field.metadata else {})


def _method(name: str) -> str:
    if problem := unusable().get(name):
        raise argparse.ArgumentTypeError(problem)
    return name


def _lambdas(text: str) -> float | list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or several as 0.2,0.5,0.8; got {text!r}") from None
    return values if len(values) > 1 else values[0]


def _rule(text: str) -> tuple[str, float]:
    pattern, _, value = text.rpartition("=")
    try:
        return pattern, float(value if pattern else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected PATTERN=LAMBDA, for instance attn=0.3; got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    models, options = read_arguments(args)
    method = records()[args.method]
    for role, given in models.items():  # told before torch is imported
        for name in given if isinstance(given, list) else [given]:
            find_model(name, adapter=role in method.adapters)

    from hf_rb import weights

    report = weights.merge_models(args.method, models, args.destination, **options)
    if args.json:
        print(json_text(asdict(report)))
    elif not report.tensors:
        print(f"Saved in {args.destination}: the adapter, as it is, as one of {models[method.receiver]}.")
    else:
        print(summary(report, args.destination))
    return 0


def read_arguments(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the models and the options of the method.

    Raises:
        ValueError: A model is missing, or an argument is one of another method.
    """
    methods = records()
    method = methods[args.method]

    def names(of: Iterable[Any]) -> set[str]:
        flags = {field.name for one in of if one.flags for field in fields(one.flags)}
        return flags | {role for one in of for role in one.models}

    own = names([method]) | ({"files_from"} if len(method.files_from) > 1 else set())
    foreign = (names(methods.values()) | {"files_from"}) - own
    given = {name: value for name, value in vars(args).items() if value is not None}
    if unused := sorted(foreign & given.keys()):
        raise ValueError(f"{', '.join(map(_option, unused))} does nothing with --method {args.method}: leave it out.")
    models = {role: given[role] for role in method.models if role in given}
    check_models(method, models)
    models = {role: names if role in method.several else names[0] for role, names in models.items()}
    shared = {field.name for field in fields(Options)}
    options = {name: value for name, value in given.items() if name in (own | shared) - method.models.keys()}
    return models, {name: dict(value) if name == "rules" else value for name, value in options.items()}


def summary(report: "MergeReport", destination: str) -> str:
    """A table by kinds of tensors, and what a user should know."""
    from pathlib import Path

    from hf_rb.utils.output import format_table
    from hf_rb.weights.sweep import sweep_folder

    kinds: dict[str, list] = {}
    for tensor in report.tensors:
        kinds.setdefault(tensor.kept or kind_of(tensor.name), []).append(tensor)
    known = COLUMNS | _columns(report.method)
    columns = [(name, show) for name, (show, _) in known.items() if show(report.merged) is not None]
    rows = [
        [f"{kind} (kept)" if tensors[0].kept else kind, str(len(tensors)), f"{sum(t.weights for t in tensors):,}"]
        + [(show([t for t in tensors if not t.kept]) if not tensors[0].kept else None) or "-" for _, show in columns]
        for kind, tensors in [*kinds.items(), ("all merged", report.merged)]
    ]
    lines = [format_table(["tensors", "number", "weights", *(name for name, _ in columns)], rows), ""]
    lines += [f"{name}: {known[name][1]}" for name, _ in columns]
    if similar := report.sigma():
        lines.append(f"sigma in the layers: {similar[0]:.4f}, mean over tensors; {similar[1]:.4f}, ratio of the sums")
        lines.append("  (the sum of |A - B| over that of |A| + |B|: 0 for equal models, at most 1)")
    if report.dropped:
        lines.append(
            f"without a place in the result: {len(report.dropped)} tensors ({', '.join(report.dropped[:3])}, …)"
        )
    lines += report.notes
    source = report.models.get(report.files_from)
    lam = report.options.get("lambda")
    sweep = lam if isinstance(lam, list) else []
    saved = [f"{sweep_folder(Path(destination), one)} (lambda {one:g})" for one in sweep]
    saved = saved or [destination if lam is None else f"{destination} (lambda {lam:g})"]
    lines.append(
        f"Saved in {', '.join(saved)}: {report.file_bytes:,} bytes of weights a model, in {report.seconds:.1f} s."
    )
    lines.append(f"Everything else is from {source}; merge.json says what was done to each tensor.")
    return "\n".join(lines)


def kind_of(name: str) -> str:
    """The part of a name that its like share: `q_proj`, `input_layernorm`, …"""
    parts = name.partition("[")[0].removesuffix(".weight").removesuffix(".bias").split(".")
    return next((part for part in reversed(parts) if not part.isdigit()), name)


def _root(tensors: list, key: str, place: int = -1) -> float | None:
    values = [tensor.measured.get(key) for tensor in tensors]
    if not values or None in values:
        return None
    return sum((value[place] if isinstance(value, list) else value) ** 2 for value in values) ** 0.5


def _ratio(key: str, to: str) -> Any:
    def show(tensors: list) -> str | None:
        value, whole = _root(tensors, key), _root(tensors, to)
        return None if value is None or whole is None else f"{value / whole if whole else 0:.2e}"

    return show


def _mean(key: str, form: str) -> Any:
    def show(tensors: list) -> str | None:
        values = [tensor.measured[key] for tensor in tensors if key in tensor.measured]
        return format(sum(values) / len(values), form) if values else None

    return show


def _columns(key: str) -> dict[str, tuple[Any, str]]:
    """The metrics of a method: means over tensors."""
    columns = {}
    for metric in catalog()[key].metrics:
        form = ".1f" if metric.range.endswith("inf)") else ".4f"
        columns[metric.name] = _mean(metric.stat or metric.name, form), metric.meaning
    return columns


# Norms of all tensors of a row together, relative to another; of a sweep, the change of the last lambda.
COLUMNS = {
    "difference": (_ratio("difference", "norm"), "norm of the difference of the two models, over that of the weights"),
    "change": (
        _ratio("change", "norm"),
        "norm of what was changed, over that of the weights; of a sweep, at its last lambda",
    ),
    "delta": (_ratio("wanted", "norm"), "norm of what tuning has taught, over that of the weights"),
    "delta lost": (_ratio("error", "wanted"), "norm of what rounding has lost of it, over its own"),
}
