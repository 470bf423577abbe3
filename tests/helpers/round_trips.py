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


def train(adapted, steps):
    """Trains an adapter on the input of these tests; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = adapted(INPUT, labels=INPUT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
