"""`hf-rb merge`: makes models from models, without training."""

import argparse
from collections import defaultdict
from dataclasses import MISSING, Field, asdict
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from hf_rb.io.model_folder import find_model
from hf_rb.methods.registry import catalog
from hf_rb.utils.output import json_text
from hf_rb.weights.options import Lambdas, arguments, check_models, records, unusable
from hf_rb.weights.report import root


if TYPE_CHECKING:
    from hf_rb.weights import MergeReport, TensorReport

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
    models = parser.add_argument_group("models: tiny:student, a folder or a Hub id")
    helps: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # of which methods, by the text
    kinds: dict[str, Field | None] = {}
    for command, method in methods.items():
        for role, text in method.models.items():
            kinds[role] = None
            helps[role][text + " (two or more times)" * (role in method.several)].append(command)
        for name, field in arguments(method).items():
            kinds.setdefault(name, field)
            helps[name][_help(field)].append(command)
    choices = [role for method in methods.values() if len(method.files_from) > 1 for role in method.files_from]
    patterns: dict[str, list[str]] = defaultdict(list)
    for command, method in methods.items():
        patterns[method.include].append(command)
    included = "; ".join(f"{pattern} with {', '.join(of)}" for pattern, of in patterns.items())
    for name, field in kinds.items():
        text = "; ".join(
            text if len(of) == len(methods) else f"{', '.join(of)}: {text}" for text, of in helps[name].items()
        )
        if field is None:
            models.add_argument(_option(name), dest=name, metavar="MODEL", action="append", help=text)
            continue
        given = _argument(field)
        if name == "files_from":
            given["choices"] = list(dict.fromkeys(choices))
        text += f" (default: {included})" * (name == "include")
        parser.add_argument(_option(name), dest=name, help=text, **given)
    parser.add_argument("--json", action="store_true", help="print the report, tensor by tensor, as JSON")


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
    own, known = (
        {name for one in of for name in (*one.models, *arguments(one))} for of in ([method], methods.values())
    )
    given = {name: value for name, value in vars(args).items() if value is not None}
    if unused := sorted((known - own) & given.keys()):
        raise ValueError(f"{', '.join(map(_option, unused))} does nothing with --method {args.method}: leave it out.")
    models = {role: given[role] for role in method.models if role in given}
    check_models(method, models)
    models = {role: names if role in method.several else names[0] for role, names in models.items()}
    options = {name: given[name] for name in arguments(method) if name in given}
    return models, {name: dict(value) if name == "rules" else value for name, value in options.items()}


def summary(report: "MergeReport", destination: str) -> str:
    """Returns a table by kinds of tensors, and notes for a user."""
    from pathlib import Path

    from hf_rb.utils.output import format_table
    from hf_rb.weights.sweep import sweep_folder

    kinds: dict[str, list] = {}
    for tensor in report.tensors:
        kinds.setdefault(tensor.kept or kind_of(tensor.name), []).append(tensor)
    metrics = {one.name: (one.stat or one.name, one.range, one.meaning) for one in catalog()[report.method].metrics}
    known = COLUMNS | metrics
    columns = {name: column for name, column in known.items() if _cell(report.merged, *column) != "-"}
    rows = [
        [f"{kind} (kept)" if tensors[0].kept else kind, str(len(tensors)), f"{sum(t.weights for t in tensors):,}"]
        + [_cell(tensors, *column) for column in columns.values()]
        for kind, tensors in [*kinds.items(), ("all merged", report.merged)]
    ]
    lines = [format_table(["tensors", "number", "weights", *columns], rows), ""]
    lines += [f"{name}: {meaning}" for name, (*_, meaning) in columns.items()]
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


def _cell(tensors: list["TensorReport"], key: str, to: str, meaning: str) -> str:
    """A norm of several tensors together, over another one, or the mean of a metric with a range; of a sweep, at its
    last lambda.
    """
    values = [tensor.measured[key] for tensor in tensors if key in tensor.measured]
    if to.startswith(("[", "(")):
        mean = sum(values) / len(values) if values else 0.0
        return "-" if not values else f"{mean:.1f}" if to.endswith("inf)") else f"{mean:.4f}"
    if len(values) < len(tensors) or not all(to in tensor.measured for tensor in tensors):
        return "-"
    whole = root(tensors, to)
    return f"{root(tensors, key) / whole if whole else 0:.2e}"


COLUMNS = {
    "difference": ("difference", "norm", "norm of the difference of the two models, over that of the weights"),
    "change": (
        "change",
        "norm",
        "norm of what was changed, over that of the weights; of a sweep, at its last lambda",
    ),
    "delta": ("wanted", "norm", "norm of what tuning has taught, over that of the weights"),
    "delta lost": ("error", "wanted", "norm of what rounding has lost of it, over its own"),
}
"""Key, the norm that it is divided by, and meaning of the columns that any method may have."""
