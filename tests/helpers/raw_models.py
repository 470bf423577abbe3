"""Checkpoints made of any tensors, in any shards: streaming reads no more of a model than that."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


__all__ = ["noise", "read", "write"]


def noise(*shape, seed=0, std=0.1, dtype=torch.float32):
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config) -> Path:
    """Writes a folder with the tensors dealt out over so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False} | config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names, weight_map = sorted(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        own = names[number::shards]
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
