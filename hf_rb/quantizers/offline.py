"""Quantizes a model folder into another one."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rb._files import atomic_folder
from hf_rb.evaluation import find_model, model_size
from hf_rb.hub import ModelCardData, changed_hyperparameters, write_model_card
from hf_rb.quantizers.report import Report


__all__ = ["quantize"]

# What a model folder holds besides its configuration and weights.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def quantize(
    source: str | Path,
    destination: str | Path,
    config: QuantizationConfigMixin | dict[str, Any],
    *,
    overwrite: bool = False,
    dtype: str = "auto",
) -> Report:
    """
    Quantizes a causal language model and saves it with its tokenizer, chat template, generation config and a model card.

    The folder appears at `destination` in one step when it is complete.

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

    Returns:
        [`Report`]

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model.
        ValueError: The model is quantized already, has a NaN, or the destination holds it.
    """
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    name, source, destination = str(source), find_model(str(source)), Path(destination)
    if source.resolve().is_relative_to(destination.resolve()):
        raise ValueError(
            f"{destination} holds the model that is to be quantized. Choose another folder for the result."
        )
    if method := _method(source):
        raise ValueError(f"{source} is quantized with {method} already. Quantize the model it was made from.")

    with atomic_folder(destination, overwrite) as folder:
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)
        model.save_pretrained(folder)
        for pattern in COMPANIONS:
            for file in source.glob(pattern):
                if file.is_file() and not (folder / file.name).exists():
                    shutil.copyfile(file, folder / file.name)
        report, size = model.hf_quantizer.report, model_size(folder)
        card = ModelCardData(
            destination.name,
            [config.quant_method],
            base_model=name,
            hyperparameters=changed_hyperparameters(config),
            size=size,
        )
        write_model_card(folder, card)
    report.set_size(size, sum(file.stat().st_size for file in source.glob("*.safetensors")))
    return report


def _method(source: Path) -> str | None:
    stored = getattr(AutoConfig.from_pretrained(source), "quantization_config", None)
    return stored and stored.get("quant_method", "something")
