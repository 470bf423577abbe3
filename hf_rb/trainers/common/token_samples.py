"""Tokens of a few sequences with a method's numbers, before and after training: the colours of `hf-rb report`."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_rb.io.resumable import write_json


__all__ = [
    "TOKEN_SAMPLES",
    "CompletionSamplesCallback",
    "TokenSamplesCallback",
    "TokenStats",
    "TrainerWithTokenStats",
    "add_token_samples",
    "certainty",
]

logger = logging.getLogger(__name__)

TOKEN_SAMPLES = "token_samples.json"


@dataclass
class TokenStats:
    """
    Attributes:
        input_ids (`torch.Tensor` of shape `(B, L)`): Tokens, the student's own completions among them where it trains
            on those.
        is_label (`torch.Tensor` of shape `(B, L-1)`): Which of the tokens from the second on are trained on.
        values (`dict[str, torch.Tensor]`): Numbers `(N,)` of those tokens, by what they are.
    """

    input_ids: torch.Tensor
    is_label: torch.Tensor
    values: dict[str, torch.Tensor]


class TrainerWithTokenStats(Protocol):
    """Trainer of ours with numbers for its tokens. One that generates has TRL's `_buffered_inputs` too."""

    _methods: Any
    _tokenizer: Any
    _prepare_inputs: Any

    @property
    def args(self) -> TrainingArguments: ...

    @property
    def model(self) -> Any: ...

    @property
    def data_collator(self) -> Any: ...

    @property
    def train_dataset(self) -> Any: ...

    def is_world_process_zero(self) -> bool: ...

    def token_stats(self, inputs: Mapping[str, Any]) -> TokenStats: ...


class TokenSamplesCallback(TrainerCallback):
    """
    Writes `token_samples.json` into `args.output_dir`: the first sequences of the training data and what the trainer's
    `token_stats` says of their tokens, when training begins and when it ends. No random number is drawn and no
    gradient computed: training is the same with it.

    Args:
        trainer ([`~transformers.Trainer`]):
            One of ours that has `token_stats`.
        rows (`int`, *optional*, defaults to `16`):
            Sequences.
        tokens (`int`, *optional*, defaults to `256`):
            Tokens of a sequence, from its start.
    """

    def __init__(self, trainer: TrainerWithTokenStats, rows: int = 16, tokens: int = 256):
        self.trainer, self.rows, self.tokens = trainer, rows, tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._record(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._record(state.global_step)

    def _record(self, step: int) -> None:
        try:
            rows = list(self._sampled())  # every process, since their passes may belong together
        except torch.OutOfMemoryError:  # a picture is not worth a training
            logger.warning(f"There was no memory for the token samples of `hf-rb report` at step {step}.")
            return
        if not rows or not self.trainer.is_world_process_zero():
            return
        path = Path(cast(str, self.trainer.args.output_dir), TOKEN_SAMPLES)
        earlier = json.loads(path.read_text(encoding="utf-8"))["snapshots"] if step and path.is_file() else []
        snapshots = [one for one in earlier if one["step"] < step] + [{"step": step, "rows": rows}]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"methods": self.trainer._methods, "snapshots": snapshots})

    def _sampled(self) -> Iterator[dict[str, Any]]:
        trainer = self.trainer
        training = trainer.model.training
        trainer.model.eval()
        try:
            for inputs in islice(self._inputs(), self.rows):
                with torch.no_grad():
                    yield _row(trainer.token_stats(inputs), trainer._tokenizer)
        finally:
            trainer.model.train(training)

    def _inputs(self) -> Iterator[dict[str, Any]]:
        """Yields what the trainer's `token_stats` takes, a sequence at a time."""
        for example in self.trainer.train_dataset:
            inputs = self.trainer._prepare_inputs(self.trainer.data_collator([example]))
            yield {name: self._cut(value) for name, value in inputs.items()}

    def _cut(self, value: Any) -> Any:
        return value[:, : self.tokens] if isinstance(value, torch.Tensor) and value.ndim == 2 else value


class CompletionSamplesCallback(TokenSamplesCallback):
    """
    The same for trainers on the student's own completions: of those that the first optimizer step is made from, before
    it is made, and of those of the last step, when training ends. Nothing is generated for it.

    Args:
        trainer, rows:
            As for [`TokenSamplesCallback`].
        tokens (`int`, *optional*, defaults to `256`):
            Tokens of a completion, from its start.
    """

    _begun = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._begun:
            self._begun = True
            self._record(state.global_step)

    def _inputs(self) -> Iterator[dict[str, Any]]:
        # TRL's buffer: what it has generated for an optimizer step, in the step's micro-batches.
        trainer: Any = self.trainer
        for batch in trainer._buffered_inputs or ():
            if "num_images" in batch:  # `token_stats` reads text
                return
            for index in range(len(batch["completion_ids"])):
                row = {name: value[index : index + 1] for name, value in batch.items() if _is_batched(value)}
                for prompt in ("prompt", "teacher_prompt"):  # without the padding, which is on the left
                    if (mask := row.get(f"{prompt}_mask")) is not None:
                        keep = mask[0].bool()
                        row |= {name: row[name][:, keep] for name in (f"{prompt}_ids", f"{prompt}_mask")}
                length = min(int(row["completion_mask"].sum()), self.tokens)
                for name in ("completion_ids", "completion_mask", "tool_mask", "sampler_logp"):
                    if name in row:
                        row[name] = row[name][:, :length]
                yield row


def _is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _row(stats: TokenStats, tokenizer: Any) -> dict[str, Any]:
    """Returns a sequence for JSON: of every token its text and its numbers, `None` where it is not trained on."""
    places = (stats.is_label[0].nonzero().flatten() + 1).tolist()
    ids = stats.input_ids[0].tolist()
    columns: dict[str, list] = {}
    for name, values in stats.values.items():
        columns[name] = [None] * len(ids)
        for place, value in zip(places, values.tolist(), strict=True):
            columns[name][place] = round(value, 5) if isinstance(value, float) else value
    return {"tokens": [tokenizer.decode([one]) for one in ids], **columns}


def add_token_samples(trainer: Trainer) -> None:
    """Adds the fitting callback to a trainer that has something to say of tokens, which depends on its flags. For
    before it trains.
    """
    if getattr(trainer, "has_token_stats", False):
        generates = hasattr(trainer, "_buffered_inputs")
        callback = CompletionSamplesCallback if generates else TokenSamplesCallback
        trainer.add_callback(callback(cast(TrainerWithTokenStats, trainer)))


def certainty(logits: torch.Tensor, labels: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """
    Returns what a calibration curve is made of: `prob`, the probability of the label, `top_prob`, that of the most
    probable token, and `correct`, whether they are the same. `logits` are `(N, V)`, `labels` `(N,)`.
    """
    probs = logits.float().softmax(-1)
    top_prob, top = probs.max(-1)
    return {"prob": probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), "top_prob": top_prob, "correct": top == labels}
