"""Interface of a teacher to a trainer."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from hf_rb.ops.lm_head import CachedLogits, TeacherLogits


__all__ = ["ModelTeacher", "Teacher", "TrainerWithTeacher"]


class Teacher(Protocol):
    """
    Source of the teacher's next-token distributions.

    `inputs` is a collated batch with `input_ids` of shape `(B, L)` and `attention_mask` or `position_ids`. `keep` of
    shape `(B, L-1)` is true at t where the prediction of token t + 1 is trained on; N is the number of such tokens,
    and what comes back has them in row-major order. Nothing has a gradient.

    Attributes:
        vocabulary (`int`, *optional*):
            Number of leading ids that teacher and student share; `None` stands for all the student has. Known after
            `prepare`.
    """

    vocabulary: int | None

    def prepare(self, trainer: Trainer) -> None:
        """
        Gets ready to score. Trainers call it once, at the end of their construction.

        Raises:
            ValueError: The teacher does not fit the student.
        """
        ...

    def score(self, inputs: Mapping[str, Any], keep: torch.Tensor) -> list[TeacherLogits] | CachedLogits:
        """Returns what [`~hf_rb.ops.lm_head.lm_head_loss`] takes as `teacher`."""
        ...


class ModelTeacher(Teacher, Protocol):
    """A teacher that runs a model, so that it can score what was not known beforehand."""

    def log_probs(self, inputs: Mapping[str, Any], keep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Returns the log-probabilities `(N,)` of given ids `(N,)` at temperature 1."""
        ...

    def logits(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Returns all logits `(B, L, V)` as the model makes them, padding included."""
        ...


class TrainerWithTeacher(Protocol):
    """
    Trainer whose teacher a capture reads: [`GKDTrainer`], or another of transformers' with a `teacher`.

    Attributes:
        teacher ([`Teacher`]):
            The teacher. A capture asks for a [`LocalTeacher`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        data_collator (`Callable`):
            Makes a batch of rows.
        train_dataset, eval_dataset (`datasets.Dataset`):
            The data, prepared.
    """

    @property
    def accelerator(self) -> Accelerator: ...

    @property
    def args(self) -> TrainingArguments: ...

    @property
    def teacher(self) -> Any: ...

    @property
    def processing_class(self) -> Any: ...

    @property
    def data_collator(self) -> Any: ...

    @property
    def train_dataset(self) -> Any: ...

    @property
    def eval_dataset(self) -> Any: ...
