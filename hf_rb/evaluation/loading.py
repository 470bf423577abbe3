"""Loads what a user names: an embedded model, a folder or a Hub id."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_rb  # noqa: F401  (registers our quantizers with transformers)
from hf_rb.io.model_class import check_causal
from hf_rb.io.model_folder import find_model


__all__ = ["find_model", "load_model"]


def load_model(folder: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model for inference, on the GPU if there is one, and its tokenizer.

    Args:
        folder (`str` or `Path`):
            Model folder.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"float32"`, `"bfloat16"`, or as the files have it.

    Raises:
        ValueError: The class that the folder names is no causal language model.
    """
    kind = check_causal(AutoConfig.from_pretrained(folder))
    device_map = "auto" if torch.cuda.is_available() else None
    model = kind.from_pretrained(folder, dtype=dtype, device_map=device_map)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer
