"""`hf-rb quantize`: quantizes a model, saves it with its tokenizer, and says what came of it."""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rb.cli.check import check, read_recipe
from hf_rb.io.files import check_replaceable
from hf_rb.io.model_folder import find_model
from hf_rb.io.resources import find_recipe
from hf_rb.utils.dtypes import WEIGHT_TYPES_OR_AUTO
from hf_rb.utils.fields import described, documented, flag, validate
from hf_rb.utils.output import json_text


if TYPE_CHECKING:
    from hf_rb.quantizers import Report

__all__ = ["QuantizeArguments"]

EXAMPLE = "hf-rb quantize tiny:student outputs/student-ptqtp --packing dense"


@documented
@dataclass
class QuantizeArguments:
    """
    The keys of a recipe for `hf-rb quantize`.

    Args:
        model_name_or_path (`str`):
            Model folder, Hub id or embedded model (`tiny:student`).
        output_dir (`str`):
            Folder for the quantized model.
    """

    model_name_or_path: str = field(metadata=described("Model folder, Hub id or embedded model (tiny:student)."))
    output_dir: str = field(metadata=described("Folder for the quantized model."))
    quantization_config: dict[str, Any] = flag(
        {}, "`quant_method` and the fields of its config. Defaults to PTQTP as [`PTQTPConfig`] has it."
    )
    dtype: str = flag(
        "auto",
        "Type in which the models are measured and trained; `auto` is that of the files.",
        choices=WEIGHT_TYPES_OR_AUTO,
    )
    overwrite: bool = flag(
        False, "Whether a model and checkpoints that `output_dir` already holds are deleted when training starts."
    )
    stream: bool = flag(
        False, "Whether to quantize tensor by tensor, with the memory of one; an interrupted run goes on where it was."
    )
    resume: bool = flag(
        True, "Whether streaming and calibration go on with unfinished work; otherwise it is thrown away."
    )
    eval_data: str | None = flag(
        None,
        "Text on which the perplexity is measured before and after: a text file, a JSON-lines file with the column"
        " `text`, a dataset of the Hub (`NAME` or `NAME:CONFIG`), or `tiny:math`, the default for embedded models.",
    )

    def __post_init__(self):
        validate(self, _rules)
        if self.eval_data is None and self.model_name_or_path.startswith("tiny:"):
            self.eval_data = "tiny:math"
        self.quantization_config = {"quant_method": "ptqtp"} | self.quantization_config


def _rules(arguments: QuantizeArguments) -> Iterator[str]:
    config = arguments.quantization_config
    calibrated = config.get("quant_method") == "d2quant" and config.get("backend") != "rtn"
    if not arguments.resume and not arguments.stream and not calibrated:
        yield (
            "`resume=False` (`--no-resume`) is for streaming and calibration: add `stream=True` (`--stream`), or "
            "leave it out."
        )
    if arguments.stream and calibrated:
        yield (
            "`stream=True` (`--stream`) quantizes tensor by tensor, which D²Quant can with `backend='rtn'` "
            "(`--backend rtn`) only: a calibrated run needs the model, and goes on where it was without `--stream`."
        )


def configure(parser: argparse.ArgumentParser, method: str | None = None) -> None:
    """Adds the verb's arguments, or those of one method alone."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="tiny:student, a model folder or a Hub id")
    parser.add_argument("destination", metavar="DEST", nargs="?", help="folder for the quantized model")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file or a recipe of hf_rb; arguments override it")
    if method is None:
        parser.add_argument("--method", choices=[*METHOD_ARGUMENTS], help="quantization method (default ptqtp)")
    else:
        parser.set_defaults(method=method)
    parser.add_argument("--group-size", type=int, help="weights of a row that share their scales (default 128)")
    parser.add_argument("--skip", nargs="+", metavar="PATTERN", help="modules to leave as they are, by name or ending")
    parser.add_argument(
        "--dtype", choices=WEIGHT_TYPES_OR_AUTO, help="type of what is not quantized (default: as saved)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.add_argument(
        "--stream", action="store_true", help="tensor by tensor, with the memory of one; goes on if killed"
    )
    parser.add_argument("--no-resume", action="store_true", help="throw away what an interrupted run has left")
    parser.add_argument(
        "--eval-data", metavar="TEXT", help="text file or dataset (NAME:CONFIG) for the perplexity before and after"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for name, (title, add_arguments) in METHOD_ARGUMENTS.items():
        if method in (None, name):
            add_arguments(parser.add_argument_group(title))


def _configure_ptqtp(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--planes", type=int, choices=[1, 2, 3], help="ternary planes (default 2)")
    parser.add_argument(
        "--planes-per-layer",
        type=_by_pattern,
        nargs="+",
        metavar="PATTERN=N",
        help="other planes, by name or ending of modules; or nsds:2.5, the sensitive layers 3 and the others 2",
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
    parser.add_argument("--no-qk", action="store_true", help="leave q_proj and k_proj as they are")


def _configure_d2quant(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--bits", type=int, choices=[2, 3, 4], help="bits of a code (default 2)")
    parser.add_argument(
        "--bits-per-layer",
        type=_by_pattern,
        nargs="+",
        metavar="PATTERN=N",
        help="other bits, by name or ending of modules; or nsds:3.0, the sensitive layers 4 and the others 2",
    )
    parser.add_argument(
        "--backend", choices=["gptaq", "gptq", "rtn"], help="rtn: round to nearest, without data (default gptaq)"
    )
    parser.add_argument(
        "--dataset",
        metavar="TEXT",
        help="calibration text: a file, a dataset (NAME:CONFIG), wikitext2, c4, c4-new or tiny:math",
    )
    parser.add_argument("--num-samples", type=int, help="sequences of calibration text (default 128)")
    parser.add_argument("--seqlen", type=int, help="tokens of a sequence (default 2048)")
    parser.add_argument("--batch-size", type=int, help="sequences that run at a time (default 1)")
    parser.add_argument("--seed", type=int, help="which sequences (default 0)")
    parser.add_argument("--no-dsq", action="store_true", help="integer grids for down projections too")
    parser.add_argument(
        "--dsq-weighting",
        choices=["hessian", "none"],
        help="what columns count in the fit of dual scales (default hessian; none is the paper's)",
    )
    parser.add_argument("--no-dac", action="store_true", help="leave the mean shift after attention")
    parser.add_argument("--no-rotate", action="store_true", help="do not rotate the hidden state")


METHOD_ARGUMENTS = {"ptqtp": ("PTQTP", _configure_ptqtp), "d2quant": ("D²Quant", _configure_d2quant)}


def _by_pattern(text: str) -> tuple[str, int] | str:
    if text.startswith("nsds:"):
        return text
    pattern, _, number = text.rpartition("=")
    if not pattern or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"expected PATTERN=N, for instance down_proj=3; got {text!r}")
    return pattern, int(number)


def run(args: argparse.Namespace) -> int:
    arguments = read_arguments(args)
    find_model(arguments.model_name_or_path)
    if not arguments.stream:  # which may have its result, and be about to clean up
        check_replaceable(Path(arguments.output_dir).resolve(), arguments.overwrite)

    from hf_rb.hub import add_section
    from hf_rb.quantizers import measure_perplexity, quantize, quantize_checkpoint
    from hf_rb.quantizers.folders.quantize import check_measurable, read_text

    models = arguments.model_name_or_path, arguments.output_dir
    if arguments.eval_data:
        check_measurable(arguments.model_name_or_path)
    if arguments.eval_data and not arguments.eval_data.startswith("tiny:"):
        read_text(arguments.eval_data)  # a wrong name is told before the work
    options = {"overwrite": arguments.overwrite, "dtype": arguments.dtype}
    if arguments.stream:
        report = quantize_checkpoint(*models, arguments.quantization_config, resume=arguments.resume, **options)
    else:
        report = quantize(*models, arguments.quantization_config, resume=arguments.resume, **options)
    if arguments.eval_data:
        measure_perplexity(report, *models, arguments.eval_data)
    if measured := report.markdown():
        add_section(Path(arguments.output_dir, "README.md"), "Measured by `hf-rb quantize`", measured)
    found = json_text(report.to_dict())
    Path(arguments.output_dir, "report.json").write_text(found + "\n", encoding="utf-8")  # for `hf-rb report`
    if args.json:
        print(found)
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
    flag = vars(args).get  # the arguments of one method may be all that there are
    method = {
        "quant_method": flag("method"),
        "group_size": flag("group_size"),
        "planes": flag("planes"),
        "scale_mode": flag("scale_mode"),
        "packing": flag("packing"),
        "modules_to_not_convert": flag("skip"),
        "quantize_qk": False if flag("no_qk") else None,
        "planes_per_layer": _settings(flag("planes_per_layer")),
        "tol_mode": flag("tol_mode"),
        "multistart": flag("multistart") or None,
        "activations": flag("activations"),
        "bits": flag("bits"),
        "bits_per_layer": _settings(flag("bits_per_layer")),
        "backend": flag("backend"),
        "dataset": flag("dataset"),
        "num_samples": flag("num_samples"),
        "seqlen": flag("seqlen"),
        "batch_size": flag("batch_size"),
        "seed": flag("seed"),
        "dsq": False if flag("no_dsq") else None,
        "dsq_weighting": flag("dsq_weighting"),
        "dac": False if flag("no_dac") else None,
        "rotate": False if flag("no_rotate") else None,
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


def _settings(given: list[tuple[str, int] | str] | None) -> dict[str, int] | str | None:
    given = given or []
    strategies = [one for one in given if isinstance(one, str)]
    if strategies and len(given) > 1:
        raise ValueError(f"{strategies[0]!r} says what every layer gets: leave out what stands beside it.")
    return strategies[0] if strategies else dict(one for one in given if not isinstance(one, str)) or None


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
        *([["  because the model reads them", _readers(report)]] if report.readers else []),
        *([["solved a second time", str(report.resolved)]] if report.method == "ptqtp" else []),
        ["solver", f"{report.seconds:.1f} s, {report.weights_per_second / 1e6:.1f} M weights/s"],
        ["weight files", f"{report.file_bytes:,} bytes; before {report.source_bytes:,}"],
        ["true bits per weight", f"{report.bits_per_weight:.2f}, embeddings and scales included"],
        ["  in the quantized layers", f"{report.quantized_bits_per_weight:.2f}, scales included"],
        ["the same at 4 bits, rounded", f"{report.baseline_file_bytes:,} bytes"],
    ]
    if report.eval_data:
        windows = f"; each window begins with {report.begins_with}" if report.begins_with else ""
        before, after = report.perplexity_before, report.perplexity_after
        facts.append([f"perplexity, {report.eval_data}", f"{after:.4g}; before {before:.4g}{windows}"])
        if report.perplexity_rounded is not None:
            rounded = f"{report.perplexity_rounded:.4g}; measured in {report.rounding_seconds:.1f} s"
            facts.append(["  the same at 4 bits, rounded", rounded])
    elif report.begins_with:
        facts.append(["calibration", f"each sequence begins with {report.begins_with}"])
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    table = format_table(["layers", "number", "weights", "relative error", "4-bit rounding"], rows)
    blocks = ["", *_blocks(report)] if report.blocks else []
    if report.allocation:
        blocks += ["", _allocation(report)]
    quality = [str(report.quality())] * (report.quality() is not None)
    return "\n".join(
        [
            table,
            *blocks,
            "",
            *lines,
            "",
            *quality,
            report.verdict(),
            f"\nSaved in {folder}. Load it after `import hf_rb`.",
        ]
    )


def _blocks(report: "Report") -> list[str]:
    """The decoder layers that were calibrated, and whether the correction of the mean did what it must."""
    from hf_rb.evaluation import format_table

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    blocks = [*report.blocks, *([report.final_norm] if report.final_norm else [])]
    rows = [[one.name, *map(shown, (one.hidden_error, one.shift_before, one.shift_after))] for one in blocks]
    lines = [format_table(["decoder layer", "error of its output", "norm's output lost", "corrected"], rows)]
    shifts = [(block.shift_before, block.shift_after, block.shift_expected) for block in blocks]
    checked = [  # a parallel MLP loses nothing by the attention
        abs(after - expected) / before
        for before, after, expected in shifts
        if before and after is not None and expected is not None
    ]
    if checked:
        worst = max(checked)
        lines.append(
            f"Mean squares on the calibration text; they fall by the square of the mean, to within {worst:.1e}."
        )
    return lines


def _allocation(report: "Report") -> str:
    """The decoder layers by how sensitive their weights look."""
    from hf_rb.evaluation import format_table

    layers = sorted(report.allocation, key=lambda layer: -layer.score)
    rows = [
        [layer.name, f"{layer.numerical:.4f}", f"{layer.structural:.4f}", f"{layer.score:.4f}", str(layer.given)]
        for layer in layers
    ]
    given = "planes" if report.method == "ptqtp" else "bits"
    return format_table(["decoder layer (NSDS)", "numerical", "structural", "sensitivity", given], rows)


def _readers(report: "Report") -> str:
    return f"{', '.join(_kinds(list(report.readers)))} ({', '.join(sorted(set(report.readers.values())))})"


def _kinds(names: list[str]) -> list[str]:
    """The last parts of names, with how many there are of each."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return [kind if count == 1 else f"{count} {kind}" for kind, count in counts.items()]
