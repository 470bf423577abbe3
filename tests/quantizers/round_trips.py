"""What tests of quantized checkpoints do over and over."""

import filecmp

import torch
from transformers import AutoModelForCausalLM


INPUT = torch.arange(24).view(2, 12)


def load(folder, config=None, **kwargs):
    """Loads a folder; a `config` of `None` is not passed on, since it would hide the one in the checkpoint."""
    if config is not None:
        kwargs["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model):
    return model(INPUT).logits


def same_files(one, other):
    """Whether two folders hold the same files, byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names
