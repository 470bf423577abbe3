"""Accuracy of generated answers: greedy exact match, and pass@k of sampled completions."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import mean
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rb.evaluation.tasks import is_correct, rendered
from hf_rb.ops.generation import generation_config, own_distribution
from hf_rb.utils.progress import tqdm


__all__ = ["Completion", "ExactMatch", "PassAtK", "exact_match", "generate", "pass_at_k"]


class Completion(NamedTuple):
    """Generated text, and whether the model ended it before the token limit."""

    text: str
    finished: bool


@dataclass(frozen=True)
class ExactMatch:
    """Result of [`exact_match`].

    Attributes:
        accuracy (`float`): Share of problems whose answer after `####` is the right one.
        lenient_accuracy (`float`): The same, with the last number of a completion as its answer where `####` is
            missing.
        by_kind (`dict[str, float]`): Accuracy on each kind of problem.
        finished (`float`): Share of completions that ended before the token limit.
        count (`int`): Number of problems.
        completions (`list[str]`): Generated texts, in the order of the problems.
        correct (`list[bool]`): Which of them are right.
    """

    accuracy: float
    lenient_accuracy: float
    by_kind: dict[str, float]
    finished: float
    count: int
    completions: list[str]
    correct: list[bool]


@dataclass(frozen=True)
class PassAtK:
    """Result of [`pass_at_k`]: the chance that at least one of `k` sampled completions is right, estimated without
    bias.
    """

    k: int
    pass_at_k: float
    pass_at_1: float
    samples: int
    temperature: float
    count: int


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    max_new_tokens: int = 256,
    batch_size: int = 64,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[Completion]]:
    """Completes prompts in left-padded batches.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            Texts, or conversations that the chat template renders.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Limit of a completion in tokens.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions generated at a time.
        samples (`int`, *optional*, defaults to `1`):
            Completions for each prompt.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature over the whole vocabulary; 0 is greedy.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling; the global generator is left as it was.

    Returns:
        `list[list[Completion]]`: `samples` completions for each prompt.

    Raises:
        ValueError: Conversations without a chat template, or more than one greedy sample.
    """
    if samples > 1 and temperature == 0:
        raise ValueError(
            f"samples={samples} at temperature=0 would be {samples} equal completions: write temperature=1.0."
        )
    chat = bool(prompts) and not isinstance(prompts[0], str)
    if chat and not tokenizer.chat_template:
        raise ValueError(
            "The prompts are conversations and the tokenizer has no chat template: give the prompts as text."
        )
    texts = [rendered(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts] if chat else prompts

    config = generation_config(model, tokenizer, max_new_tokens, temperature, samples)
    pad, ends = config.pad_token_id, set(config.eos_token_id or [])

    ids = tokenizer(list(texts), add_special_tokens=not chat)["input_ids"] if texts else []
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))  # rows of a batch are of similar length
    completions: list[list[Completion]] = [[] for _ in ids]
    step = max(batch_size // samples, 1)
    training, sample = model.training, cast(Callable[..., torch.Tensor], model.generate)
    model.eval()
    # TRL leaves `output_router_logits` on in mixtures of experts that it has trained. transformers then computes the
    # balance loss of every token that it generates, and fails on padded prompts: the mask covers all tokens so far,
    # the routers have seen one.
    routers = {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}
    with torch.random.fork_rng(), own_distribution(model):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(order), step), desc="generating", delay=2, leave=False, disable=None):
            rows = order[start : start + step]
            width = max(len(ids[row]) for row in rows)
            padded = torch.tensor([[pad] * (width - len(ids[row])) + ids[row] for row in rows], device=model.device)
            mask = torch.tensor(
                [[0] * (width - len(ids[row])) + [1] * len(ids[row]) for row in rows], device=model.device
            )
            new = sample(input_ids=padded, attention_mask=mask, generation_config=config, **routers)
            new = new[:, width:].tolist()
            for index, tokens in enumerate(new):
                text = cast(str, tokenizer.decode(tokens, skip_special_tokens=True))
                completions[rows[index // samples]].append(Completion(text, not ends.isdisjoint(tokens)))
    model.train(training)
    return completions


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    max_new_tokens: int = 256,
    batch_size: int = 64,
) -> ExactMatch:
    """Solves problems greedily and compares the answers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        dataset (`Iterable[Mapping]`):
            Rows with `prompt` (text or conversation), `answer` and, optionally, `kind`.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Limit of a completion in tokens.
        batch_size (`int`, *optional*, defaults to `64`):
            Problems solved at a time.

    Returns:
        [`ExactMatch`]

    Raises:
        ValueError: The dataset is empty.
    """
    rows = _rows(dataset)
    generated = generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens, batch_size)
    completions = [completion for (completion,) in generated]
    correct = [is_correct(c.text, row["answer"]) for c, row in zip(completions, rows, strict=True)]
    lenient = [is_correct(c.text, row["answer"], lenient=True) for c, row in zip(completions, rows, strict=True)]
    by_kind = defaultdict(list)
    for row, right in zip(rows, correct, strict=True):
        by_kind[row.get("kind", "all")].append(right)
    return ExactMatch(
        accuracy=mean(correct),
        lenient_accuracy=mean(lenient),
        by_kind={kind: mean(by_kind[kind]) for kind in sorted(by_kind)},
        finished=mean(completion.finished for completion in completions),
        count=len(rows),
        completions=[completion.text for completion in completions],
        correct=correct,
    )


def pass_at_k(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    k: int = 8,
    samples: int | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 256,
    seed: int = 0,
) -> PassAtK:
    """Samples solutions and estimates pass@k as `1 - C(n - c, k) / C(n, k)` with `c` right of `n` samples.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        dataset (`Iterable[Mapping]`):
            Rows with `prompt` (text or conversation) and `answer`.
        k (`int`, *optional*, defaults to `8`):
            Attempts.
        samples (`int`, *optional*):
            Completions for each problem, at least `k`, which is the default.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Limit of a completion in tokens.
        batch_size (`int`, *optional*, defaults to `256`):
            Completions generated at a time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.

    Returns:
        [`PassAtK`]

    Raises:
        ValueError: Fewer samples than `k`, or an empty dataset.
    """
    n = k if samples is None else samples
    if n < k:
        raise ValueError(f"pass@{k} cannot be estimated from samples={n}: write samples={k} or more.")
    rows = _rows(dataset)
    generated = generate(
        model, tokenizer, [row["prompt"] for row in rows], max_new_tokens, batch_size, n, temperature, seed
    )
    right = [sum(is_correct(c.text, row["answer"]) for c in group) for group, row in zip(generated, rows, strict=True)]
    return PassAtK(
        k=k,
        pass_at_k=mean(1 - comb(n - c, k) / comb(n, k) for c in right),
        pass_at_1=mean(c / n for c in right),
        samples=n,
        temperature=temperature,
        count=len(rows),
    )


def _rows(dataset: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    rows = list(dataset)
    if not rows:
        raise ValueError("The dataset has no rows: there is nothing to measure.")
    return rows
