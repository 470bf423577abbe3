"""The true size of a saved model: bits per weight are computed from the stored bytes of the whole files.

Only the headers of the safetensors files and the model's config are read; no weight is loaded.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hf_rb.io.model_class import skeleton
from hf_rb.io.model_folder import adapter_beside
from hf_rb.io.safetensors import Checkpoint


__all__ = ["Size", "model_size"]


@dataclass(frozen=True)
class Size:
    """Size of a saved model.

    Attributes:
        file_bytes (`int`): Bytes of all weight files, headers and the adapter of a recovered model included.
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


def model_size(folder: str | Path, variant: str | None = None, subfolder: str = "") -> Size:
    """Measures the weight files of a folder, plain or quantized by hf_rb, in one file or in shards.

    Args:
        folder (`str` or `Path`):
            Folder that `save_pretrained` wrote.
        variant (`str`, *optional*), subfolder (`str`, *optional*, defaults to `""`):
            Which weights of the folder, and where in it, as in `from_pretrained`.

    Returns:
        [`Size`]

    Raises:
        FileNotFoundError: The folder, its config or a weight file is missing.
        ValueError: A weight file is not in the safetensors format.
    """
    folder = Path(folder, subfolder)
    checkpoint = Checkpoint(folder, variant)
    adapter = adapter_beside(folder)
    files = [*checkpoint.files, *([adapter] if adapter else [])]
    file_bytes, weights = sum(file.stat().st_size for file in files), _logical_weights(folder)

    tensors = checkpoint.entries
    packed = {name for name, entry in tensors.items() if entry.dtype == torch.uint8 and f"{name}_scale" in tensors}
    packed_bytes = plain_weights = 0
    for name, entry in tensors.items():
        if name in packed or name.rpartition("_")[0] in packed:  # its scale, zero point, …
            packed_bytes += entry.nbytes
        else:
            plain_weights += math.prod(entry.shape)
    quantized_weights = weights - plain_weights if packed else 0
    return Size(
        file_bytes=file_bytes,
        weights=weights,
        bits_per_weight=8 * file_bytes / weights,
        quantized_weights=quantized_weights,
        quantized_bits_per_weight=8 * packed_bytes / quantized_weights if packed else None,
    )


def _logical_weights(folder: Path) -> int:
    config: Any = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the shapes of the model as it was before packing
    return sum(parameter.numel() for parameter in skeleton(config).parameters())
