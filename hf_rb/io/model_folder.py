"""Model folders as folders: finding one by what a user writes, and what it holds besides weights and configuration.

Only the standard library is imported at the top, so that a tool which streams weights does not pay for transformers.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_rb import tiny
from hf_rb.io.files import check_replaceable
from hf_rb.methods.registry import methods


__all__ = [
    "ADAPTER_CONFIG",
    "COMPANIONS",
    "adapter_beside",
    "check_apart",
    "check_model",
    "check_models",
    "check_plain",
    "companions",
    "copy_companions",
    "find_model",
    "find_packed",
    "local_folder",
    "public_name",
    "quantization_method",
]

ADAPTER_CONFIG = "adapter_config.json"

_NOWHERE = (
    "There is no folder {}, and the Hub has no such model or cannot be reached: write tiny:student, the path of a "
    "model folder or a Hub id."
)

# Files of a model folder besides its configuration and weights.
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


def find_model(name: str, adapter: bool = False, subfolder: str = "") -> Path:
    """Returns the folder of a model, downloading a Hub model that is not cached.

    Args:
        name (`str`):
            `"tiny:student"` and the like, a folder that `save_pretrained` wrote, or a Hub id.
        adapter (`bool`, *optional*, defaults to `False`):
            Whether a folder with an adapter will do too.
        subfolder (`str`, *optional*, defaults to `""`):
            Where in the folder or the repository the model is.

    Raises:
        FileNotFoundError: None of the three.
    """
    folder = Path(tiny.resolve(name), subfolder)
    if (folder / "config.json").is_file():
        return folder
    if (folder / ADAPTER_CONFIG).is_file():
        if adapter:
            return folder
        raise FileNotFoundError(f"{name} holds an adapter, not a model: merge it into its base model and save that.")
    if folder.is_dir():
        raise FileNotFoundError(f"{name} is not a model folder: it has no config.json.")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns), subfolder)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(_NOWHERE.format(name)) from error


def local_folder(name: str) -> Path | None:
    """Returns a model's folder if it is on this machine, in the Hub's cache too."""
    folder = Path(tiny.resolve(name)).expanduser()
    if (folder / "config.json").is_file():
        return folder
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    try:
        folder = cached / "snapshots" / (cached / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return folder if (folder / "config.json").is_file() else None


def check_model(name: str, revision: str | None = None) -> None:
    """
    Looks for a model, or an adapter, without loading it or downloading its weights.

    Args:
        name (`str`):
            `"tiny:student"` and the like, a folder or a Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub's repository.

    Raises:
        FileNotFoundError: There is no such folder, and no such repository, or the Hub cannot be reached and the cache
            does not have it.
    """
    if Path(tiny.resolve(name)).is_dir():
        return

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    try:
        hf_hub_download(name, "config.json", revision=revision)
    except RemoteEntryNotFoundError:
        return  # an adapter's repository
    except GatedRepoError:
        raise  # says what to do
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(_NOWHERE.format(name)) from error


def check_models(recipe: Mapping[str, Any]) -> None:
    """Looks for the student and the teacher of a recipe as [`check_model`] does, before anything heavy is imported."""
    for key in ("model", "teacher_model"):
        if isinstance(name := recipe.get(f"{key}_name_or_path"), str):
            check_model(name, recipe.get(f"{key}_revision"))


def check_plain(folder: Path) -> None:
    """Refuses a model folder with an adapter in it, which `from_pretrained` would add to the weights."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds an adapter beside the model ({ADAPTER_CONFIG}), and `from_pretrained` loads both. Merge "
            "the adapter into the model with PEFT's `merge_and_unload` and save that, or move the adapter's files "
            "out of the folder to leave it out."
        )


def check_apart(source: Path, destination: Path) -> None:
    """Refuses a destination that would replace the model it is made from."""
    if source.resolve().is_relative_to(destination.resolve()):
        raise ValueError(
            f"{destination} holds the model that the result is made from. Choose another folder for the result."
        )


def public_name(name: str) -> str:
    """Returns what may be published of a name: of a path its last part, a Hub id and an embedded model as they are."""
    if not (os.path.isabs(name) or name.startswith(("~", "./", "../")) or os.path.exists(name)):
        return name
    path = Path(os.path.abspath(name))
    return next((f"tiny:{member}" for member in tiny.MODELS if tiny.path(member) == path), path.name)


def quantization_method(folder: Path) -> str | None:
    """Returns the method with which a saved model is quantized."""
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    return stored.get("quant_method", "something") if stored else None


def find_packed(source: str | Path, destination: str | Path, overwrite: bool) -> Path:
    """
    Returns the folder of a model that hf_rb has quantized and that is to be written to `destination` in another form.

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model.
        ValueError: It is not quantized by hf_rb, or the destination holds it.
    """
    folder, destination = find_model(str(source)), Path(destination)
    check_apart(folder, destination)
    method = quantization_method(folder)
    ours = methods("quantizer")  # whose files our verbs rewrite
    if method not in ours:
        found = f"quantized with {method}" if method else "not quantized"
        raise ValueError(
            f"{source} is {found}. Give the folder of a model that was quantized with {' or '.join(ours)}."
        )
    check_replaceable(destination.resolve(), overwrite)
    return folder


def adapter_beside(folder: Path) -> Path | None:
    """Returns the weights of the adapter in a folder of `hf-rb recover`; of any other folder nothing."""
    adapter = folder / "adapter"
    return adapter / "adapter_model.safetensors" if (adapter / "base.json").is_file() else None


def companions(folder: Path) -> list[Path]:
    """Returns tokenizer, chat template, generation config and licence of a model folder, in the order of their
    names.
    """
    return sorted({file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()})


def copy_companions(source: Path, folder: Path) -> None:
    """Copies tokenizer, chat template, generation config and licence, where the folder has none of its own."""
    for file in companions(source):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
