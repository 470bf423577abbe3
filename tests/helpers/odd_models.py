"""Small models with code of all kinds that reads the weight of a layer, or only seems to."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class OddConfig(PreTrainedConfig):
    model_type = "odd"
    hidden_size: int = 64


class Odd(PreTrainedModel):
    """Layers `a`, `b`, `c`, a pair and one that nobody reads; `mix` says who reads which."""

    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        size = config.hidden_size
        self.embed = nn.Embedding(32, size)
        self.a, self.b, self.c = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.pair = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(2))
        self.free = nn.Linear(size, size, bias=False)
        self.out = nn.Linear(size, 8, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.1)

    def mix(self, hidden):
        return hidden

    def forward(self, input_ids, **kwargs):
        hidden = self.mix(self.embed(input_ids))
        for layer in (self.a, self.b, self.c, *self.pair, self.free):
            hidden = hidden + torch.tanh(layer(hidden))
        return (self.out(hidden),)


def apply(hidden, layer):
    return F.linear(hidden, layer.weight)


class Product(Odd):
    def mix(self, hidden):
        return hidden @ self.a.weight


class Type(Odd):
    def mix(self, hidden):
        return hidden.to(self.b.weight.dtype)


class Alias(Odd):
    def mix(self, hidden):
        layer = self.c
        return hidden @ layer.weight


class Loop(Odd):
    def mix(self, hidden):
        for number, layer in enumerate(self.pair):
            hidden = hidden @ layer.weight * (number + 1)
        return hidden


class Index(Odd):
    def mix(self, hidden):
        return hidden @ self.pair[1].weight


class ByName(Odd):
    def mix(self, hidden):
        return hidden @ getattr(getattr(self, "a"), "weight")  # noqa: B009


class Handed(Odd):
    def mix(self, hidden):
        return apply(hidden, self.b)


class OnlyOnOneDevice(Odd):
    def mix(self, hidden):
        return hidden @ self.c.weight if hidden.is_cuda else hidden


class FirstParameter(Odd):
    def mix(self, hidden):
        return hidden.to(next(self.pair.parameters()).dtype)


class Hidden(Odd):
    """Only a forward pass finds this one."""

    def mix(self, hidden):
        return hidden @ self._modules["a"].weight


class Guarded(Odd):
    """Reads that mean the same for bytes, or do not happen when the model is quantized."""

    def mix(self, hidden):
        hidden = hidden.to(self.a.weight.device)
        if isinstance(self.b.weight, torch.Tensor) and self.b.weight.dtype != torch.uint8:
            hidden = hidden.to(self.b.weight.dtype)
        if hasattr(self.config, "_is_quantized"):
            hidden = hidden + self.c(hidden)
        else:
            hidden = hidden + hidden @ self.c.weight.T
        return hidden


class Seeding(Product):
    """Draws numbers in its forward pass, as BigBird chooses its random blocks."""

    def mix(self, hidden):
        np.random.seed(0)
        return super().mix(hidden) * random.random() * torch.rand(1, device="cpu").item()


READERS = {
    Product: ["a"],
    Type: ["b"],
    Alias: ["c"],
    Loop: ["pair.0", "pair.1"],
    Index: ["pair.0", "pair.1"],  # which of them, the source does not tell
    ByName: ["a"],
    Handed: ["b"],
    OnlyOnOneDevice: ["c"],
    FirstParameter: ["pair.0"],
    Hidden: ["a"],
    Guarded: [],
    Odd: [],
}
