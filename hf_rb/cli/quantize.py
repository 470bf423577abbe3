"""`hf-rb quantize`: quantizes a model, saves it with its tokenizer, and says what came of it."""

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rb._fields import described, validate
from hf_rb._resources import find_recipe
from hf_rb.cli.check import check, read_recipe


if TYPE_CHECKING:
    from hf_rb.quantizers import Report

__all__ = ["QuantizeArguments"]

EXAMPLE = "hf-rb quantize tiny:student outputs/student-ptqtp --packing dense"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class QuantizeArguments:
    """
    The keys of a recipe for `hf-rb quantize`.

    Args:
        model_name_or_path (`str`):
            Model folder, Hub id or embedded model (`tiny:student`).
        output_dir (`str`):
            Folder for the quantized model.
        quantization_config (`dict`, *optional*):
            `quant_method` and the fields of its config. Defaults to PTQTP as [`PTQTPConfig`] has it.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type in which the weights are read and what is not quantized gets saved.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.
        stream (`bool`, *optional*, defaults to `False`):
            Whether to quantize tensor by tensor, with the memory of one; an interrupted run goes on where it was.
        resume (`bool`, *optional*, defaults to `True`):
            Whether streaming goes on with unfinished work; otherwise it is thrown away.
        eval_data (`str`, *optional*):
            Text on which the perplexity is measured before and after: a text file, a JSON-lines file with the column
            `text`, a dataset of the Hub (`NAME` or `NAME:CONFIG`), or `tiny:math`, the default for embedded models.
    """

    model_name_or_path: str = field(metadata=described("Model folder, Hub id or embedded model (tiny:student)."))
    output_dir: str = field(metadata=described("Folder for the quantized model."))
    quantization_config: dict[str, Any] = field(
        default_factory=dict, metadata=described("`quant_method` and the fields of its config.")
    )
    dtype: str = field(default="auto", metadata=described("Type of what is not quantized.", choices=DTYPES))
    overwrite: bool = field(default=False, metadata=described("Whether to replace a folder that is not empty."))
    stream: bool = field(
        default=False, metadata=described("Whether to quantize tensor by tensor, with the memory of one.")
    )
    resume: bool = field(default=True, metadata=described("Whether streaming goes on with unfinished work."))
    eval_data: str | None = field(
        default=None, metadata=described("Text file or dataset on which the perplexity is measured before and after.")
    )

    def __post_init__(self):
        validate(self, _rules)
        if self.eval_data is None and self.model_name_or_path.startswith("tiny:"):
            self.eval_data = "tiny:math"
        self.quantization_config = {"quant_method": "ptqtp"} | self.quantization_config


def _rules(arguments):
    if not arguments.resume and not arguments.stream:
        yield "`resume=False` (`--no-resume`) is for streaming: add `stream=True` (`--stream`), or leave it out."


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="tiny:student, a model folder or a Hub id")
    parser.add_argument("destination", metavar="DEST", nargs="?", help="folder for the quantized model")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file or a recipe of hf_rb; arguments override it")
    parser.add_argument("--method", choices=["ptqtp"], help="quantization method (default ptqtp)")
    parser.add_argument("--group-size", type=int, help="weights of a row that share their scales (default 128)")
    parser.add_argument("--planes", type=int, choices=[1, 2, 3], help="ternary planes (default 2)")
    parser.add_argument(
        "--planes-per-layer",
        type=_planes,
        nargs="+",
        metavar="PATTERN=N",
        help="other planes, by name or ending of modules",
    )
    parser.add_argument(
        "--tol-mode", choices=["absolute", "relative", "absolute_strict"], help="stopping rule (default absolute)"
    )
    parser.add_argument(
        "--multistart",
        action="store_true",
        help="also solve from other starting points, keep the best (not the paper's)",
    )
    parser.add_argument(
        "--scale-mode", choices=["free", "tied"], help="tied: 4-bit codes that `hf-rb export` can write"
    )
    parser.add_argument("--packing", choices=["dense", "nibble"], help="bytes in the file (default dense)")
    parser.add_argument(
        "--activations", choices=["exact", "int8"], help="int8: round inputs of layers where that is faster"
    )
    parser.add_argument("--skip", nargs="+", metavar="PATTERN", help="modules to leave as they are, by name or ending")
    parser.add_argument("--no-qk", action="store_true", help="leave q_proj and k_proj as they are")
    parser.add_argument("--dtype", choices=DTYPES, help="type of what is not quantized (default: as saved)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.add_argument(
        "--stream", action="store_true", help="tensor by tensor, with the memory of one; goes on if killed"
    )
    parser.add_argument("--no-resume", action="store_true", help="throw away what an interrupted --stream has left")
    parser.add_argument(
        "--eval-data", metavar="TEXT", help="text file or dataset (NAME:CONFIG) for the perplexity before and after"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _planes(text: str) -> tuple[str, int]:
    pattern, _, planes = text.rpartition("=")
    if not pattern or not planes.isdecimal():
        raise argparse.ArgumentTypeError(f"expected PATTERN=N, for instance down_proj=3; got {text!r}")
    return pattern, int(planes)


def run(args: argparse.Namespace) -> int:
    arguments = read_arguments(args)

    from hf_rb.quantizers import measure_perplexity, quantize, quantize_checkpoint
    from hf_rb.quantizers.offline import read_text

    models = arguments.model_name_or_path, arguments.output_dir
    if arguments.eval_data and not arguments.eval_data.startswith("tiny:"):
        read_text(arguments.eval_data)  # a wrong name is told before the work
    options = {"overwrite": arguments.overwrite, "dtype": arguments.dtype}
    if arguments.stream:
        report = quantize_checkpoint(*models, arguments.quantization_config, resume=arguments.resume, **options)
    else:
        report = quantize(*models, arguments.quantization_config, **options)
    if arguments.eval_data:
        measure_perplexity(report, *models, arguments.eval_data)
    if args.json:
        print(json.dumps(asdict(report) | {"verdict": report.verdict()}, indent=2))
    else:
        print(_summary(report, arguments.output_dir))
    return 0


def read_arguments(args: argparse.Namespace) -> QuantizeArguments:
    """Lays the command line over the recipe.

    Raises:
        ValueError: What `hf-rb check` finds wrong with the two, or no model or folder given.
    """
    values = read_recipe(find_recipe(args.config)) if args.config else {}
    given = {
        "model_name_or_path": args.model,
        "output_dir": args.destination,
        "dtype": args.dtype,
        "overwrite": args.overwrite or None,
        "stream": args.stream or None,
        "resume": False if args.no_resume else None,
        "eval_data": args.eval_data,
    }
    method = {
        "quant_method": args.method,
        "group_size": args.group_size,
        "planes": args.planes,
        "scale_mode": args.scale_mode,
        "packing": args.packing,
        "modules_to_not_convert": args.skip,
        "quantize_qk": False if args.no_qk else None,
        "planes_per_layer": dict(args.planes_per_layer) if args.planes_per_layer else None,
        "tol_mode": args.tol_mode,
        "multistart": args.multistart or None,
        "activations": args.activations,
    }
    values |= _given(given)
    if isinstance(values.setdefault("quantization_config", {}), dict):  # anything else is refused below
        values["quantization_config"] |= _given(method)
    errors = check(Path(args.config or "the command line"), values, "quantize").errors
    if any(message.endswith("is missing.") for message in errors):
        errors.append("Write `hf-rb quantize MODEL DEST`, or give a recipe that names both with `--config`.")
    if errors:
        raise ValueError("\n".join(errors))
    return QuantizeArguments(**values)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _summary(report: "Report", folder: str) -> str:
    from hf_rb.evaluation import format_table

    rows, baseline = [], report.error_by_kind("baseline_error")
    for kind, error in (report.error_by_kind() | {"all": report.error()}).items():
        layers = [layer for layer in report.layers if kind in (layer.kind, "all")]
        rtn = report.error("baseline_error") if kind == "all" else baseline[kind]
        weights = sum(layer.weights for layer in layers)
        rows.append([kind, str(len(layers)), f"{weights:,}", f"{error:.4f}", "-" if rtn is None else f"{rtn:.4f}"])
    facts = [
        ["weights quantized", f"{sum(layer.weights for layer in report.layers):,} of {report.parameters:,}"],
        ["left as they are", ", ".join(_kinds(report.skipped)) or "-"],
        ["solved a second time", str(report.resolved)],
        ["solver", f"{report.seconds:.1f} s, {report.weights_per_second / 1e6:.1f} M weights/s"],
        ["weight files", f"{report.file_bytes:,} bytes; before {report.source_bytes:,}"],
        ["true bits per weight", f"{report.bits_per_weight:.2f}, embeddings and scales included"],
        ["  in the quantized layers", f"{report.quantized_bits_per_weight:.2f}, scales included"],
        ["the same at 4 bits, rounded", f"{report.baseline_file_bytes:,} bytes"],
    ]
    if report.eval_data:
        before, after = report.perplexity_before, report.perplexity_after
        facts.append([f"perplexity, {report.eval_data}", f"{after:.4g}; before {before:.4g}"])
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    table = format_table(["layers", "number", "weights", "relative error", "4-bit rounding"], rows)
    return "\n".join([table, "", *lines, "", report.verdict(), f"\nSaved in {folder}. Load it after `import hf_rb`."])


def _kinds(names: list[str]) -> list[str]:
    """The last parts of names, with how many there are of each."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return [kind if count == 1 else f"{count} {kind}" for kind, count in counts.items()]
