"""Quantizes a model folder into another one."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rb._files import atomic_folder, check_replaceable
from hf_rb._model_folder import check_apart, check_plain, copy_companions, find_model
from hf_rb._unfinished import STATE, partial_folder
from hf_rb._weight_files import weight_bytes
from hf_rb.evaluation import Size, beginning, load_model, load_task, model_size, perplexity, solutions
from hf_rb.hub import ModelCardData, changed_hyperparameters, write_model_card
from hf_rb.quantizers.report import Report
from hf_rb.quantizers.texts import read_texts


__all__ = [
    "complete_folder",
    "describe",
    "measure_perplexity",
    "open_source",
    "quantization_method",
    "quantize",
    "read_text",
]

EVAL_PROBLEMS = 200


def quantize(
    source: str | Path,
    destination: str | Path,
    config: QuantizationConfigMixin | dict[str, Any],
    *,
    overwrite: bool = False,
    dtype: str = "auto",
    resume: bool = True,
    variant: str | None = None,
    subfolder: str = "",
) -> Report:
    """
    Quantizes a causal language model and saves it with its tokenizer, chat template, generation config and a model card.

    The folder appears at `destination` in one step when it is complete. The whole model is in memory at a time;
    [`quantize_checkpoint`] writes the same tensors with the memory of one. A method that runs the model on calibration text
    keeps its finished layers in a hidden folder beside the destination until then.

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
            Type in which the weights are read and those that stay as they are get saved; `"auto"` is that of the files.
        resume (`bool`, *optional*, defaults to `True`):
            Whether calibration goes on with finished layers of an earlier call; `False` throws them away.
        variant (`str`, *optional*), subfolder (`str`, *optional*, defaults to `""`):
            Which weights of the model, and where in its folder, as in `from_pretrained`.

    Returns:
        [`Report`]

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model.
        ValueError: The model is quantized already, has a NaN, the destination holds it, or the finished layers are of another
            model, text or configuration.
    """
    folder, destination, config = open_source(source, destination, config, subfolder)
    work = partial_folder(destination.resolve())
    if getattr(config, "calibrated", False):
        config = replace(config, resume_dir=config.resume_dir or str(work))
        if not resume:
            (Path(config.resume_dir) / STATE).unlink(missing_ok=True)
    check_replaceable(destination.resolve(), overwrite)
    source_bytes = weight_bytes(folder, variant)  # says what is missing, which loading would say in its own words
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, variant=variant)
    with atomic_folder(destination, overwrite) as result:  # only now: a run that is killed leaves its temporary folder
        model.save_pretrained(result)
        size = complete_folder(result, folder, source, destination.name, config)
    shutil.rmtree(work, ignore_errors=True)
    model.hf_quantizer.report.set_size(size, source_bytes)
    return model.hf_quantizer.report


def measure_perplexity(report: Report, source: str | Path, destination: str | Path, data: str) -> None:
    """
    Fills in the perplexities of a report, of the model before and of the saved quantized one.

    Args:
        report ([`Report`]):
            What to fill in.
        source, destination (`str` or `Path`):
            The two models. Each is loaded as a whole.
        data (`str`):
            A text file, a JSON-lines file with the column `text`, `"tiny:math"`, or a dataset of the Hub as `NAME` or
            `NAME:CONFIG`, of which the column `text` of the split `test` is taken. Of a text the first 16,384 tokens count, in
            windows of 512 that do not overlap; of `tiny:math` the worked solutions of 200 problems.

    Raises:
        FileNotFoundError, ValueError: There is no such data, or it has no column `text`.
    """
    text = None if data.startswith("tiny:") else read_text(data)
    values = []
    for folder in (find_model(str(source)), destination):
        model, tokenizer = load_model(folder)
        if text is None:
            texts, contexts = solutions(tokenizer, load_task(data, EVAL_PROBLEMS))
            measured = perplexity(model, tokenizer, texts, contexts=contexts)
        else:
            measured = perplexity(model, tokenizer, beginning(tokenizer, text))
        values.append(measured.perplexity)
        del model
    report.eval_data = data if data.startswith("tiny:") else Path(data).name
    report.perplexity_before, report.perplexity_after = values


def read_text(data: str) -> str:
    """Returns the text of a file or a dataset (see [`measure_perplexity`])."""
    return "\n\n".join(read_texts(data, split="test"))


def open_source(
    source: str | Path, destination: str | Path, config: QuantizationConfigMixin | dict[str, Any], subfolder: str = ""
) -> tuple[Path, Path, QuantizationConfigMixin]:
    """Returns the folder of the model, the destination as a path, and the config as an object, or refuses them."""
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    folder, destination = find_model(str(source), subfolder=subfolder), Path(destination)
    check_apart(folder, destination)
    check_plain(folder)
    if method := quantization_method(folder):
        raise ValueError(f"{folder} is quantized with {method} already. Quantize the model it was made from.")
    return folder, destination, config


def quantization_method(folder: Path) -> str | None:
    """Returns the method with which a saved model is quantized."""
    stored = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    return stored and stored.get("quant_method", "something")


def complete_folder(
    folder: Path, source_folder: Path, source: str | Path, name: str, config: QuantizationConfigMixin
) -> Size:
    """Adds to written weights and their config what else belongs to a model called `name`, and measures them."""
    copy_companions(source_folder, folder)
    size = model_size(folder)
    card = ModelCardData(name, [config.quant_method], base_model=str(source), size=size, **describe(config))
    write_model_card(folder, card)
    return size


def describe(config: QuantizationConfigMixin) -> dict[str, dict[str, Any]]:
    """Returns what a model card says of a quantization config: `hyperparameters` and `summaries`, as [`ModelCardData`] has them."""
    stored, silent = config.to_dict(), {*getattr(config, "written", ()), *getattr(config, "idle", ())}
    # A card publishes no more than config.json.
    changed = [name for name in changed_hyperparameters(config) if name in stored and name not in silent]
    return {
        "hyperparameters": {key: stored[key] for key in changed},
        "summaries": {config.quant_method: config.summary},
    }
