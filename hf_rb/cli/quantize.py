"""`hf-rb quantize`: quantizes a model and saves it with its tokenizer."""

import argparse
import json
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
    """

    model_name_or_path: str = field(metadata=described("Model folder, Hub id or embedded model (tiny:student)."))
    output_dir: str = field(metadata=described("Folder for the quantized model."))
    quantization_config: dict[str, Any] = field(
        default_factory=dict, metadata=described("`quant_method` and the fields of its config.")
    )
    dtype: str = field(default="auto", metadata=described("Type of what is not quantized.", choices=DTYPES))
    overwrite: bool = field(default=False, metadata=described("Whether to replace a folder that is not empty."))

    def __post_init__(self):
        validate(self)
        self.quantization_config = {"quant_method": "ptqtp"} | self.quantization_config


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="tiny:student, a model folder or a Hub id")
    parser.add_argument("destination", metavar="DEST", nargs="?", help="folder for the quantized model")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file or a recipe of hf_rb; arguments override it")
    parser.add_argument("--method", choices=["ptqtp"], help="quantization method (default ptqtp)")
    parser.add_argument("--group-size", type=int, help="weights of a row that share their scales (default 128)")
    parser.add_argument("--packing", choices=["dense", "nibble"], help="bytes in the file (default dense)")
    parser.add_argument("--skip", nargs="+", metavar="PATTERN", help="modules to leave as they are, by name or ending")
    parser.add_argument("--no-qk", action="store_true", help="leave q_proj and k_proj as they are")
    parser.add_argument("--dtype", choices=DTYPES, help="type of what is not quantized (default: as saved)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    arguments = read_arguments(args)

    from hf_rb.quantizers import quantize

    report = quantize(
        arguments.model_name_or_path,
        arguments.output_dir,
        arguments.quantization_config,
        overwrite=arguments.overwrite,
        dtype=arguments.dtype,
    )
    if args.json:
        print(json.dumps(asdict(report), indent=2))
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
    }
    method = {
        "quant_method": args.method,
        "group_size": args.group_size,
        "packing": args.packing,
        "modules_to_not_convert": args.skip,
        "quantize_qk": False if args.no_qk else None,
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

    rows = []
    for kind, error in report.error_by_kind().items():
        layers = [layer for layer in report.layers if layer.kind == kind]
        rows.append([kind, str(len(layers)), f"{sum(layer.weights for layer in layers):,}", f"{error:.4f}"])
    facts = [
        ["weights quantized", f"{sum(layer.weights for layer in report.layers):,} of {report.parameters:,}"],
        ["left as they are", ", ".join(report.skipped) or "-"],
        ["solved a second time", str(report.resolved)],
        ["solver", f"{report.seconds:.1f} s, {report.weights_per_second / 1e6:.1f} M weights/s"],
        ["weight files", f"{report.file_bytes:,} bytes"],
        ["true bits per weight", f"{report.bits_per_weight:.2f}, embeddings and scales included"],
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    table = format_table(["layers", "number", "weights", "relative error"], rows)
    return "\n".join([table, "", *lines, f"\nSaved in {folder}. Load it after `import hf_rb`."])
