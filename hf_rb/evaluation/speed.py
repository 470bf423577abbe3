"""Decoding speed at a fixed length, without the bookkeeping of `generate`."""

from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from transformers import PreTrainedModel

from hf_rb.utils import compat


__all__ = ["Speed", "decode_speed"]


@dataclass(frozen=True)
class Speed:
    """A measured decoding speed.

    Attributes:
        tokens_per_second (`float`): Median over the repeats; all sequences of the batch counted.
        spread (`float`): `(fastest - slowest) / median`: differences between models below it mean nothing.
        new_tokens (`int`): Tokens generated for each sequence.
        prompt_tokens (`int`): Tokens of the prompt, whose processing is not counted.
        batch_size (`int`): Sequences at a time.
        repeats (`int`): Timed repeats, after one that is not.
    """

    tokens_per_second: float
    spread: float
    new_tokens: int
    prompt_tokens: int
    batch_size: int
    repeats: int


@torch.no_grad()
def decode_speed(
    model: PreTrainedModel,
    new_tokens: int = 64,
    prompt_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
) -> Speed:
    """Times greedy decoding with a cache.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        new_tokens (`int`, *optional*, defaults to `64`):
            Tokens to generate for each sequence; an end-of-sequence token does not stop it.
        prompt_tokens (`int`, *optional*, defaults to `32`):
            Length of the prompt, whose processing is not timed.
        batch_size (`int`, *optional*, defaults to `1`):
            Sequences at a time.
        repeats (`int`, *optional*, defaults to `5`):
            Timed repeats, after one to warm up.

    Returns:
        [`Speed`]
    """
    training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    prompt = (torch.arange(prompt_tokens, device=model.device) % vocabulary).expand(batch_size, -1)
    seconds = [_decode(model, prompt, new_tokens) for _ in range(repeats + 1)][1:]
    model.train(training)
    middle = median(seconds)
    return Speed(
        tokens_per_second=batch_size * new_tokens / middle,
        spread=(max(seconds) - min(seconds)) / middle,
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        repeats=repeats,
    )


def _decode(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> float:
    output = model(input_ids=prompt, use_cache=True)
    _synchronize(model)
    start = perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token, use_cache=True, **compat.cache_of(output))
    _synchronize(model)
    return perf_counter() - start


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
