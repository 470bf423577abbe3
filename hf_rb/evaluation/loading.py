"""Loads what a user names: an embedded model, a folder or a Hub id."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_rb  # noqa: F401  (registers our quantizers with transformers)
from hf_rb import tiny


__all__ = ["find_model", "load_model"]


def find_model(name: str) -> Path:
    """Returns the folder of a model, downloading a Hub model that is not cached.

    Args:
        name (`str`):
            `"tiny:student"` and the like, a folder that `save_pretrained` wrote, or a Hub id.

    Raises:
        FileNotFoundError: None of the three.
    """
    folder = Path(tiny.resolve(name))
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{name} holds an adapter, not a model: merge it into its base model and save that.")
    if folder.is_dir():
        raise FileNotFoundError(f"{name} is not a model folder: it has no config.json.")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no folder {name}, and the Hub has no such model or cannot be reached: write tiny:student, the path "
            "of a model folder or a Hub id."
        ) from error


def load_model(folder: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model for inference, on the GPU if there is one, and its tokenizer.

    Args:
        folder (`str` or `Path`):
            Model folder.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"float32"`, `"bfloat16"`, or as the files have it.
    """
    device_map = "auto" if torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
