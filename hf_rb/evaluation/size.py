"""The true size of a saved model: bits per weight are computed from the stored bytes of the whole files.

Only the headers of the safetensors files and the model's config are read; no weight is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


__all__ = ["Size", "model_size"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Size:
    """Size of a saved model.

    Attributes:
        file_bytes (`int`): Bytes of all weight files, headers included.
        weights (`int`): Weights of the model these files describe, before any packing; tied weights count once.
        bits_per_weight (`float`): `8 * file_bytes / weights`.
        quantized_weights (`int`): Weights of the layers stored in packed form.
        quantized_bits_per_weight (`float`, *optional*): Bits that those layers take for each of their weights, scales
            included; `None` when no layer is packed.
    """

    file_bytes: int
    weights: int
    bits_per_weight: float
    quantized_weights: int
    quantized_bits_per_weight: float | None


def model_size(folder: str | Path) -> Size:
    """Measures the weight files of a folder, plain or quantized by hf_rb, in one file or in shards.

    Args:
        folder (`str` or `Path`):
            Folder that `save_pretrained` wrote.

    Returns:
        [`Size`]

    Raises:
        FileNotFoundError: The folder, its config or a weight file is missing.
        ValueError: A weight file is not in the safetensors format.
    """
    folder = Path(folder)
    files = _weight_files(folder)
    tensors = {name: entry for file in files for name, entry in _header(file).items()}
    file_bytes, weights = sum(file.stat().st_size for file in files), _logical_weights(folder)

    packed = {
        name.removesuffix(".weight")
        for name, entry in tensors.items()
        if name.endswith(".weight") and entry["dtype"] == "U8"
    }
    packed_bytes = plain_weights = 0
    for name, entry in tensors.items():
        module, _, parameter = name.rpartition(".")
        if module in packed and parameter != "bias":
            start, stop = entry["data_offsets"]
            packed_bytes += stop - start
        else:
            plain_weights += torch.Size(entry["shape"]).numel()
    quantized_weights = weights - plain_weights if packed else 0
    return Size(
        file_bytes=file_bytes,
        weights=weights,
        bits_per_weight=8 * file_bytes / weights,
        quantized_weights=quantized_weights,
        quantized_bits_per_weight=8 * packed_bytes / quantized_weights if packed else None,
    )


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json.")
    index = folder / INDEX
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else {SINGLE}
    files = [folder / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: save the model with `save_pretrained`.")
    return files


def _header(file: Path) -> dict[str, dict]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if length > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is not a safetensors file, or it is truncated ({error}).") from error
    header.pop("__metadata__", None)
    return header


def _logical_weights(folder: Path) -> int:
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the shapes of the model as it was before packing
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
