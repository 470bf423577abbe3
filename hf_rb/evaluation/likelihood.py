"""Perplexity over sliding windows.

Every text is tokenized once and cut into windows of `window` tokens that begin `stride` tokens apart. A token is
scored once, in the first window that holds it and at least one token before it:

- `stride == window`: the windows do not overlap, and the first token of each is not scored. This is how the
  quantization literature measures WikiText-2 (there, a last incomplete window is dropped; here it counts).
- `stride < window`: every token but the first of its text is scored, behind at least `window - stride` tokens of
  context or all there is.

Where the tokenizer puts a token before a text (BOS), every window begins with it: it stands in front of the window's
own tokens and is neither counted nor scored. The same tokens are scored with it and without it. What a tokenizer puts
behind a text (EOS) is left out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rb.utils.progress import tqdm
from hf_rb.utils.special_tokens import begins_with, special_tokens


__all__ = ["Perplexity", "beginning", "perplexity"]

WINDOW = 512


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        perplexity (`float`): `exp(nats_per_token)`.
        nats_per_token (`float`): Mean negative log-likelihood of the scored tokens.
        bytes_per_token (`float`): UTF-8 bytes of the texts divided by their tokens; it makes models with different
            tokenizers comparable.
        bits_per_byte (`float`): `nats_per_token / ln(2) / bytes_per_token`.
        tokens (`int`): Number of scored tokens.
        window (`int`): Window length in tokens of the text.
        stride (`int`): Distance between the starts of two windows in tokens.
        begins_with (`str`, *optional*): What the tokenizer puts before a text, and every window therefore begins with,
            such as `"<bos>"`.
    """

    perplexity: float
    nats_per_token: float
    bytes_per_token: float
    bits_per_byte: float
    tokens: int
    window: int
    stride: int
    begins_with: str | None = None


def beginning(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int = 16_384) -> str:
    """Returns what the first so many tokens of a text are made of: as much of it as verbs measure unasked."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return text[: max(end for _, end in encoded["offset_mapping"][:tokens])]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    contexts: Sequence[str] | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Measures the token-level perplexity of texts.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        texts (`str` or `Sequence[str]`):
            Texts to score, each by itself. Give a corpus as one string.
        window (`int`, *optional*):
            Window length in tokens, at least 2. Defaults to 512, or to what fits into the model's positions.
        stride (`int`, *optional*):
            Distance between the starts of two windows, in `[1, window]`. Defaults to the window.
        contexts (`Sequence[str]`, *optional*):
            One text in front of each of `texts` that is read but not scored, as a chat prompt before its completion.
            What the tokenizer puts before a text is then put before windows only where the context begins with it.
        batch_size (`int`, *optional*, defaults to `8`):
            Windows in one forward pass.

    Returns:
        [`Perplexity`]

    Raises:
        ValueError: Window or stride out of range, a window longer than the model's positions, or nothing to score.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    head, _, name = special_tokens(tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None)
    room = positions - len(head) if positions else math.inf
    window = int(min(WINDOW, room)) if window is None else window
    stride = window if stride is None else stride
    if not 1 <= stride <= window or window < 2:
        raise ValueError(
            f"window={window} and stride={stride} do not fit: write 2 <= window and 1 <= stride <= window."
        )
    if window > room:
        front = f" with {name} in front of it" if head else ""
        raise ValueError(
            f"window={window}{front} is longer than the {positions} positions of the model: write window={room} "
            f"(`--window {room}`)."
        )

    windows, size, tokens = [], 0, 0
    for index, text in enumerate(texts):
        context, ids = (
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] if part else []
            for part in (contexts[index] if contexts else "", text)
        )
        size += len(text.encode())
        tokens += len(ids)
        whole, first, front = context + ids, len(context), [] if contexts else head
        if begins_with(whole, head):  # as chat templates have it
            whole, first, front = whole[len(head) :], max(first - len(head), 0), head
        windows += ((front + own, len(front) + start) for own, start in _windows(whole, first, window, stride))
    if not windows:
        raise ValueError(
            f"The texts have {tokens} tokens in all, none with a token before it: there is nothing to score."
        )

    windows.sort(key=lambda item: len(item[0]), reverse=True)  # rows of a batch are of similar length
    training = model.training
    model.eval()
    nats, scored = 0.0, 0
    for start in tqdm(range(0, len(windows), batch_size), desc="perplexity", delay=2, leave=False, disable=None):
        batch = windows[start : start + batch_size]
        nats += _nats(model, batch)
        scored += sum(len(ids) - first for ids, first in batch)
    model.train(training)

    mean, bytes_per_token = nats / scored, size / tokens
    return Perplexity(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        nats_per_token=mean,
        bytes_per_token=bytes_per_token,
        bits_per_byte=mean / math.log(2) / bytes_per_token,
        tokens=scored,
        window=window,
        stride=stride,
        begins_with=name if any(begins_with(ids, head) for ids, _ in windows) else None,
    )


def _windows(ids: list[int], first: int, window: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Yields windows that score something, each with the index inside it of the first token it scores."""
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        first = max(first, start + 1)
        if first < stop:
            yield ids[start:stop], first - start
            first = stop
        if stop == len(ids):
            return


def _nats(model: PreTrainedModel, batch: list[tuple[list[int], int]]) -> float:
    """Sum of the negative log-likelihoods that the windows score."""
    length = len(batch[0][0])
    input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch], device=model.device)
    # Padding is on the right, where a causal model cannot see it; the mask is for models with other ideas.
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch], device=model.device)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return sum(
        F.cross_entropy(
            logits[row, first - 1 : len(ids) - 1].float(), input_ids[row, first : len(ids)], reduction="sum"
        ).item()
        for row, (ids, first) in enumerate(batch)
    )
