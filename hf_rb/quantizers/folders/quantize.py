"""Quantizes a model folder into another one."""

import shutil
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import AutoQuantizationConfig

from hf_rb.evaluation import Size, beginning, load_model, load_task, model_size, perplexity, solutions
from hf_rb.hub import ModelCardData, changed_hyperparameters, write_model_card
from hf_rb.io.files import atomic_folder, check_replaceable
from hf_rb.io.model_class import check_causal, model_class
from hf_rb.io.model_folder import check_apart, check_plain, copy_companions, find_model, quantization_method
from hf_rb.io.resumable import STATE, partial_folder
from hf_rb.io.texts import read_texts
from hf_rb.io.weight_files import weight_bytes
from hf_rb.quantizers.config import PackedConfig
from hf_rb.quantizers.packed.baseline import round_weights
from hf_rb.quantizers.packed.report import Report


__all__ = [
    "check_measurable",
    "complete_folder",
    "describe",
    "measure_perplexity",
    "open_source",
    "quantize",
    "read_text",
]

EVAL_PROBLEMS = 200


def quantize(
    source: str | Path,
    destination: str | Path,
    config: PackedConfig | dict[str, Any],
    *,
    overwrite: bool = False,
    dtype: str = "auto",
    resume: bool = True,
    variant: str | None = None,
    subfolder: str = "",
) -> Report:
    """
    Quantizes a model, of the class that its config names, and saves it with its tokenizer or processor, chat template,
    generation config and a model card.

    The folder appears at `destination` in one step when it is complete. The whole model is in memory at a time;
    [`quantize_checkpoint`] writes the same tensors with the memory of one. A method that runs the model on calibration
    text keeps its finished layers in a hidden folder beside the destination until then.

    Args:
        source (`str` or `Path`):
            Model folder, Hub id or embedded model (`"tiny:student"`) that is not quantized.
        destination (`str` or `Path`):
            Folder to write.
        config ([`PTQTPConfig`] or `dict`):
            Quantization config; as a dict it has the key `quant_method`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type in which the weights are read and those that stay as they are get saved; `"auto"` is that of the
            files.
        resume (`bool`, *optional*, defaults to `True`):
            Whether calibration goes on with finished layers of an earlier call; `False` throws them away.
        variant (`str`, *optional*), subfolder (`str`, *optional*, defaults to `""`):
            Which weights of the model, and where in its folder, as in `from_pretrained`.

    Returns:
        [`Report`]

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model.
        ValueError: The model is quantized already, has a NaN, the destination holds it, or the finished layers are of
            another model, text or configuration.
    """
    folder, destination, config = open_source(source, destination, config, subfolder)
    work = partial_folder(destination.resolve())
    if config.calibrated:
        calibrated: Any = config  # which has such a field
        config = calibrated = replace(calibrated, resume_dir=calibrated.resume_dir or str(work))
        if not resume:
            (Path(calibrated.resume_dir) / STATE).unlink(missing_ok=True)
    check_replaceable(destination.resolve(), overwrite)
    source_bytes = weight_bytes(folder, variant)  # says what is missing, which loading would say in its own words
    kind = model_class(AutoConfig.from_pretrained(folder))
    model: Any = kind.from_pretrained(folder, quantization_config=config, dtype=dtype, variant=variant)
    with atomic_folder(destination, overwrite) as result:  # only now: a run that is killed leaves its temporary folder
        model.save_pretrained(result)
        size = complete_folder(result, folder, source, destination.name, config)
    shutil.rmtree(work, ignore_errors=True)
    model.hf_quantizer.report.set_size(size, source_bytes)
    return model.hf_quantizer.report


def measure_perplexity(report: Report, source: str | Path, destination: str | Path, data: str) -> None:
    """
    Fills in the perplexities of a report: of the model before, of the same model with its layers rounded to 4 bits,
    and of the saved quantized one.

    Args:
        report ([`Report`]):
            What to fill in.
        source, destination (`str` or `Path`):
            The two models. Each is loaded as a whole.
        data (`str`):
            A text file, a JSON-lines file with the column `text`, `"tiny:math"`, or a dataset of the Hub as `NAME` or
            `NAME:CONFIG`, of which the column `text` of the split `test` is taken. Of a text the first 16,384 tokens
            count, in windows of 512 that do not overlap; of `tiny:math` the worked solutions of 200 problems.

    Raises:
        FileNotFoundError, ValueError: There is no such data, or it has no column `text`.
    """
    text = None if data.startswith("tiny:") else read_text(data)

    def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        if text is None:
            texts, contexts = solutions(tokenizer, load_task(data, EVAL_PROBLEMS))
            found = perplexity(model, tokenizer, texts, contexts=contexts)
        else:
            found = perplexity(model, tokenizer, beginning(tokenizer, text))
        report.begins_with = found.begins_with
        return found.perplexity

    report.eval_data = data if data.startswith("tiny:") else Path(data).name
    model, tokenizer = load_model(find_model(str(source)))
    report.bits_before = 8 * model.dtype.itemsize
    report.perplexity_before = measured(model, tokenizer)
    start = time.perf_counter()
    if round_weights(model, [layer.name for layer in report.layers]):
        report.perplexity_rounded = measured(model, tokenizer)
        report.rounding_seconds = time.perf_counter() - start
    del model
    report.perplexity_after = measured(*load_model(destination))


def check_measurable(source: str | Path) -> None:
    """Refuses a model for [`measure_perplexity`] before it is quantized: with a `ValueError` if it is no causal
    language model.
    """
    check_causal(AutoConfig.from_pretrained(find_model(str(source))), "Perplexity (`--eval-data`)")


def read_text(data: str) -> str:
    """Returns the text of a file or a dataset (see [`measure_perplexity`])."""
    return "\n\n".join(read_texts(data, split="test"))


def open_source(
    source: str | Path, destination: str | Path, config: PackedConfig | dict[str, Any], subfolder: str = ""
) -> tuple[Path, Path, PackedConfig]:
    """Returns the folder of the model, the destination as a path, and the config as an object, or refuses them."""
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    folder, destination = find_model(str(source), subfolder=subfolder), Path(destination)
    check_apart(folder, destination)
    check_plain(folder)
    if method := quantization_method(folder):
        raise ValueError(f"{folder} is quantized with {method} already. Quantize the model it was made from.")
    return folder, destination, config


def complete_folder(folder: Path, source_folder: Path, source: str | Path, name: str, config: PackedConfig) -> Size:
    """Adds to written weights and their config what else belongs to a model called `name`, and measures them."""
    copy_companions(source_folder, folder)
    size = model_size(folder)
    card = ModelCardData(name, [config.quant_method], base_model=str(source), size=size, **describe(config))
    write_model_card(folder, card)
    return size


def describe(config: PackedConfig) -> dict[str, Any]:
    """Returns what a model card says of a quantization config: `hyperparameters` and `summaries`, as [`ModelCardData`]
    has them.
    """
    stored, silent = config.to_dict(), {*config.record.written, *config.idle}
    # A card publishes no more than config.json.
    changed = [name for name in changed_hyperparameters(config) if name in stored and name not in silent]
    changed.sort(key=[field.name for field in fields(PackedConfig)].__contains__)  # the method's own come first
    return {
        "hyperparameters": {key: stored[key] for key in changed},
        "summaries": {config.quant_method: config.summary},
    }
