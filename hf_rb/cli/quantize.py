"""`hf-rb quantize`: quantizes a model, saves it with its tokenizer, and says what came of it."""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rb.cli import schemas
from hf_rb.cli.check import check, read_recipe
from hf_rb.io.files import check_replaceable
from hf_rb.io.model_folder import find_model
from hf_rb.io.resources import find_recipe
from hf_rb.methods.registry import find, methods, name_problem
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
        "Type of what is not quantized; `auto` is that of the files.",
        choices=WEIGHT_TYPES_OR_AUTO,
    )
    overwrite: bool = flag(False, "Whether to replace a folder that is not empty.")
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
    entry = methods("quantizer").get(config.get("quant_method", "ptqtp"))
    calibrated = entry is not None and entry.method.is_calibrated(config)
    if not arguments.resume and not arguments.stream and not calibrated:
        yield (
            "`resume=False` (`--no-resume`) is for streaming and calibration: add `stream=True` (`--stream`), or "
            "leave it out."
        )
    if arguments.stream and entry and calibrated:
        fields = entry.method.uncalibrated or {}
        written = " and ".join(f"`{name}={value!r}` (`--{name} {value}`)" for name, value in fields.items())
        yield (
            f"`stream=True` (`--stream`) quantizes tensor by tensor, which {entry.method.name} can with {written} "
            "only: a calibrated run needs the model, and goes on where it was without `--stream`."
        )


def configure(parser: argparse.ArgumentParser, method: str | None = None) -> None:
    """Adds the verb's arguments, or those of one method alone."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="tiny:student, a model folder or a Hub id")
    parser.add_argument("destination", metavar="DEST", nargs="?", help="folder for the quantized model")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file or a recipe of hf_rb; arguments override it")
    if method is None:
        names = "{" + ",".join(methods("quantizer")) + "}"
        parser.add_argument("--method", type=_method, metavar=names, help="quantization method (default ptqtp)")
    else:
        parser.set_defaults(method=method)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for name, entry in schemas.load("quantize").items():
        if name not in _GIVEN_OTHERWISE:
            _add_option(parser, name, entry)
    for title, fields in _options([method] if method else [*methods("quantizer")]).items():
        group = parser.add_argument_group(title) if title else parser
        for name, entry in fields.items():
            _add_option(group, name, entry, _DEST)


_GIVEN_OTHERWISE = ("model_name_or_path", "output_dir", "quantization_config")
# Fields that no command line sets, and those whose option has another name.
_NO_OPTIONS = ("quant_method", "format_version", "dequantize")
_DEST = "quantization_config."
_SPELLED = {"modules_to_not_convert": "skip", "quantize_qk": "qk"}


def _options(names: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the fields of methods by title, those of several methods without one, and with what these agree on."""
    found: dict[str, dict[str, dict[str, Any]]] = {"": {}}
    keys = {name: schemas.load(name) for name in names}
    for name in names:
        method = find("quantizer", name).method
        for field_name, entry in keys[name].items():
            if field_name in (*_NO_OPTIONS, *method.written):
                continue
            all_entries = [other[field_name] for other in keys.values() if field_name in other]
            common = {key: one for key, one in entry.items() if all(other.get(key) == one for other in all_entries)}
            title = "" if len(all_entries) > 1 else method.name
            found.setdefault(title, {})[field_name] = {"types": entry["types"], "help": entry["help"]} | common
    return found


def _add_option(parser: Any, name: str, entry: dict[str, Any], prefix: str = "") -> None:
    """Adds the options of a field, by its type, choices and default."""
    types, default, choices = {*entry["types"]} - {"null"}, entry.get("default"), entry.get("choices", [])
    text = entry["help"].partition(". ")[0].rstrip(".").replace("%", "%%")
    spelled, on = _SPELLED.get(name, name).replace("_", "-"), [one for one in choices if one not in (None, False)]
    common = {"dest": prefix + name, "default": argparse.SUPPRESS}
    if off := [False] if default is True else [one for one in choices if one in (None, False)]:
        help = f"`{name}: {'null' if off[0] is None else 'false'}`: {text}"
        parser.add_argument(f"--no-{spelled}", action="store_const", const=off[0], help=help, **common)
        if len(on) < 2:
            return
    if default is not None and default is not False:
        text += f" (default {default})"
    option: dict[str, Any] = {"type": _TYPES.get(tuple(sorted(types)), str), "metavar": name.upper()}
    if types == {"bool"}:
        option = {"action": "store_true"}
    elif "dict" in types:
        option = {"type": _by_pattern, "nargs": "+", "metavar": "PATTERN=N", "action": _Settings}
    elif on:
        option |= {"choices": on, "metavar": None}
    elif types == {"list[str]"}:
        option |= {"nargs": "+", "metavar": "PATTERN"}
    try:
        parser.add_argument(f"--{spelled}", help=text, **option, **common)
    except argparse.ArgumentError:
        pass  # the verb itself has an option of this name: a recipe can set the field


class _Settings(argparse.Action):
    """Makes one value of `PATTERN=N ...` or `nsds:N`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        strategies = [one for one in values if isinstance(one, str)]
        if strategies and len(values) > 1:
            what = f"{strategies[0]!r} says what every layer gets: leave out what stands beside it."
            raise argparse.ArgumentError(self, what)
        setattr(namespace, self.dest, strategies[0] if strategies else dict(values))


def _method(text: str) -> str:
    if problem := name_problem("quantizer", text, "--method"):
        raise argparse.ArgumentTypeError(problem)
    return text


def _integer_or_text(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


_TYPES = {("int",): int, ("float",): float, ("int", "str"): _integer_or_text}


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
    places = {"model_name_or_path": args.model, "output_dir": args.destination}
    options = {name: value for name, value in vars(args).items() if name in schemas.load("quantize")}
    fields = {name.removeprefix(_DEST): value for name, value in vars(args).items() if name.startswith(_DEST)}
    method = _given({"quant_method": args.method}) | fields
    values |= _given(places) | options
    if isinstance(values.setdefault("quantization_config", {}), dict):  # anything else is refused below
        values["quantization_config"] |= method
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
    method = find("quantizer", report.method).method
    for kind, error in (report.error_by_kind() | {"all": report.error()}).items():
        layers = [layer for layer in report.layers if kind in (layer.kind, "all")]
        rtn = report.error("baseline_error") if kind == "all" else baseline[kind]
        weights = sum(layer.weights for layer in layers)
        rows.append([kind, str(len(layers)), f"{weights:,}", f"{error:.4f}", "-" if rtn is None else f"{rtn:.4f}"])
    facts = [
        ["weights quantized", f"{sum(layer.weights for layer in report.layers):,} of {report.parameters:,}"],
        ["left as they are", ", ".join(_kinds(report.skipped)) or "-"],
        *([["  because the model reads them", _readers(report)]] if report.readers else []),
        *([["solved a second time", str(report.resolved)]] if method.solves_again else []),
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
    unit = find("quantizer", report.method).method.unit
    return format_table(["decoder layer (NSDS)", "numerical", "structural", "sensitivity", unit], rows)


def _readers(report: "Report") -> str:
    return f"{', '.join(_kinds(list(report.readers)))} ({', '.join(sorted(set(report.readers.values())))})"


def _kinds(names: list[str]) -> list[str]:
    """The last parts of names, with how many there are of each."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return [kind if count == 1 else f"{count} {kind}" for kind, count in counts.items()]
