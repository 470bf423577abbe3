"""`hf-rb merge`: makes models from models, without training."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hf_rb.io.model_folder import find_model
from hf_rb.utils.dtypes import WEIGHT_TYPES
from hf_rb.utils.output import json_text


if TYPE_CHECKING:
    from hf_rb.weights import MergeReport

EXAMPLE = """hf-rb merge --method linear --start Qwen/Qwen3-4B-Instruct-2507 --end Qwen/Qwen3-4B-Thinking-2507 \\
      --lambda 0.4,0.6,0.8 --files-from end outputs/interpolated
  hf-rb merge --method graft --base Qwen/Qwen3-4B-Base --tuned outputs/tuned-base --onto Qwen/Qwen3-4B outputs/grafted
  hf-rb merge --method graft --tuned outputs/adapter-of-base --onto Qwen/Qwen3-4B outputs/grafted
  hf-rb merge --method timber --base Qwen/Qwen3-4B-Base --model Qwen/Qwen3-4B --lambda 0.2 outputs/refined"""

# Options by the methods that have them, and those that a method cannot do without.
MODELS = {"linear": ("start", "end"), "graft": ("base", "tuned", "onto"), "timber": ("base", "model")}
NEEDED = {"linear": ("start", "end"), "graft": ("tuned", "onto"), "timber": ("model",)}
OPTIONS = {
    "linear": ("lam", "rules", "rank", "files_from", "extrapolate"),
    "graft": ("keep_adapter",),
    "timber": ("lam", "extrapolate", "spectra", "device"),
}
SHARED = ("include", "mismatch", "dtype", "overwrite", "resume", "progress")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=list(MODELS), required=True, help="what to do with the models")
    parser.add_argument("destination", metavar="DEST", help="folder to write; of several lambdas, a folder of folders")
    models = parser.add_argument_group("models: tiny:student, a folder or a Hub id")
    models.add_argument("--start", metavar="MODEL", help="linear: the model, or LoRA adapter, at lambda 0")
    models.add_argument("--end", metavar="MODEL", help="linear: the model, or LoRA adapter, at lambda 1")
    models.add_argument("--base", metavar="MODEL", help="graft, timber: the Base model")
    models.add_argument("--tuned", metavar="MODEL", help="graft: Base after its fine-tuning, or its LoRA adapter")
    models.add_argument("--onto", metavar="MODEL", help="graft: the Instruct model that gets what Base has learned")
    models.add_argument(
        "--model", metavar="MODEL", help="timber: the Instruct model, or a LoRA adapter without --base"
    )
    parser.add_argument(
        "--lambda",
        dest="lam",
        type=_lambdas,
        metavar="X[,X...]",
        help="in [0, 1], several for a sweep; linear: place between start and end (default 0.5); timber: factor of "
        "the tail (default 0.2). A negative one after an equals sign: --lambda=-0.5,0",
    )
    parser.add_argument(
        "--rule",
        dest="rules",
        type=_rule,
        action="append",
        metavar="PATTERN=X",
        help="linear: another lambda for some tensors, as layers:0-11=0.8 or attn=0; may be repeated, the first that "
        "fits holds",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="linear, adapters: rank of the result (default: exact)")
    parser.add_argument(
        "--include",
        metavar="PATTERN",
        help="tensors to change: all, linear, attn, mlp, embed, head, norm, router, layers:0-11 or a regular "
        "expression (default: linear, with --method linear all)",
    )
    parser.add_argument(
        "--files-from",
        choices=["start", "end"],
        help="linear: whose configuration, tokenizer, chat template and generation config; must be said where they "
        "differ",
    )
    parser.add_argument(
        "--mismatch", choices=["refuse", "skip"], help="tensors that do not fit: refuse (default), or keep as they are"
    )
    parser.add_argument("--dtype", choices=WEIGHT_TYPES, help="type of all floating tensors")
    parser.add_argument("--device", help="timber: where to decompose (default: the GPU if there is one)")
    _add_switch(parser, "--spectra", help="timber: effective ranks of both models too (default: yes)")
    _add_switch(parser, "--keep-adapter", help="graft: write the adapter as one of --onto (default: merge it)")
    _add_switch(parser, "--extrapolate", help="lambdas outside [0, 1] are meant (default: no)")
    _add_switch(parser, "--overwrite", help="replace a folder that is not empty (default: no)")
    _add_switch(parser, "--resume", help="go on with what an interrupted call has left (default: yes)")
    _add_switch(parser, "--progress", help="show a progress bar, on a terminal (default: yes)")
    parser.add_argument("--json", action="store_true", help="print the report, tensor by tensor, as JSON")


def _add_switch(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    """Adds a flag with its opposite; `None` where neither is given, so that a flag of another method is noticed."""
    parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=help)


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
    for name in filter(None, models.values()):  # told before torch is imported
        find_model(name, adapter=True)

    from hf_rb import weights

    function = {"linear": weights.interpolate, "graft": weights.graft, "timber": weights.refine}[args.method]
    report = function(destination=args.destination, **models, **options)
    if args.json:
        print(json_text(report and asdict(report)))
    elif report is None:
        print(f"Saved in {args.destination}: the adapter, as it is, as one of {args.onto}.")
    else:
        print(summary(report, args.destination))
    return 0


def read_arguments(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the models and the options of the method's function.

    Raises:
        ValueError: A model is missing, or an argument is one of another method.
    """
    method = args.method
    given = {name for name in vars(args) if getattr(args, name) is not None}
    own = {*MODELS[method], *OPTIONS[method], *SHARED}
    foreign = {name for names in (*MODELS.values(), *OPTIONS.values()) for name in names} - own
    if unused := sorted(foreign & given):
        names = ", ".join(
            "--" + {"lam": "lambda", "rules": "rule"}.get(name, name.replace("_", "-")) for name in unused
        )
        raise ValueError(f"{names} does nothing with --method {method}: leave it out.")
    if missing := [name for name in NEEDED[method] if name not in given]:
        raise ValueError(f"--method {method} needs {' and '.join(f'--{name} MODEL' for name in missing)}.")
    options = {name: getattr(args, name) for name in (*OPTIONS[method], *SHARED) if name in given}
    if "rules" in options:
        options["rules"] = dict(options["rules"])
    models = {name: getattr(args, name) for name in MODELS[method]}
    return models, options


def summary(report: "MergeReport", destination: str) -> str:
    """A table by kinds of tensors, and what a user should know."""
    from pathlib import Path

    from hf_rb.utils.output import format_table
    from hf_rb.weights.sweep import sweep_folder

    kinds: dict[str, list] = {}
    for tensor in report.tensors:
        kinds.setdefault(tensor.kept or kind_of(tensor.name), []).append(tensor)
    columns = [(name, show) for name, (show, _) in COLUMNS.items() if show(report.merged) is not None]
    rows = [
        [f"{kind} (kept)" if tensors[0].kept else kind, str(len(tensors)), f"{sum(t.weights for t in tensors):,}"]
        + [(show([t for t in tensors if not t.kept]) if not tensors[0].kept else None) or "-" for _, show in columns]
        for kind, tensors in [*kinds.items(), ("all merged", report.merged)]
    ]
    lines = [format_table(["tensors", "number", "weights", *(name for name, _ in columns)], rows), ""]
    lines += [f"{name}: {COLUMNS[name][1]}" for name, _ in columns]
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


# Norms of all tensors of a row together, relative to another; of a sweep, the change of the last lambda.
COLUMNS = {
    "difference": (_ratio("difference", "norm"), "norm of the difference of the two models, over that of the weights"),
    "change": (
        _ratio("change", "norm"),
        "norm of what was changed, over that of the weights; of a sweep, at its last lambda",
    ),
    "delta": (_ratio("wanted", "norm"), "norm of what tuning has taught, over that of the weights"),
    "delta lost": (_ratio("error", "wanted"), "norm of what rounding has lost of it, over its own"),
    "erank Base": (
        _mean("erank_base", ".1f"),
        "effective rank, the number of directions that count, mean over matrices",
    ),
    "erank model": (_mean("erank_model", ".1f"), "the same of the Instruct model"),
    "erank D": (_mean("erank", ".1f"), "the same of D, their difference"),
    "k": (_mean("k", ".1f"), "directions of D that stay as they are; those behind are multiplied by lambda"),
    "rank": (_mean("rank", ".1f"), "all directions of D"),
    "energy kept": (_mean("energy", ".4f"), "share of the first k in the square of D's norm"),
}
