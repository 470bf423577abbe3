"""Rows of a trainer's data that a capture of its teacher reads, and the shard of each of them."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from hf_rb.ops.packing import is_packed, leak_message
from hf_rb.ops.sequences import Sequences
from hf_rb.teachers.protocol import TrainerWithTeacher


__all__ = ["CapturePlan"]


class CapturePlan:
    """
    Shards of the rows of the data: long rows first, every different row once, rows without a label never.

    One pass over the collated data makes it, and it is the same each time.

    Attributes:
        shards (`list[np.ndarray]`): Row numbers.
        lengths (`np.ndarray`): Tokens of every row.
        tokens (`int`): Predictions in all.
        data (`str`): SHA-256 of the token ids and labels, in the data's order.
    """

    def __init__(self, trainer: TrainerWithTeacher, shard_tokens: int):
        self._datasets, self._collate = _datasets(trainer), trainer.data_collator
        self._vocabulary = trainer.teacher.vocabulary
        self._is_checked = getattr(trainer.args, "allow_leaking_packing", False)
        self._offsets = np.cumsum([0] + [len(dataset) for dataset in self._datasets])
        digest, seen = hashlib.sha256(), set()
        lengths, labels = np.zeros(self._offsets[-1], np.int64), np.zeros(self._offsets[-1], np.int64)
        for row in tqdm(range(self._offsets[-1]), desc="Reading the data", disable=trainer.args.disable_tqdm):
            batch = self.batch([row])
            keep = self.kept(batch)
            name = hashlib.sha256(
                _bytes(batch["input_ids"]) + _bytes(Sequences(batch).positions) + _bytes(keep)
            ).digest()
            digest.update(name)
            if name not in seen:
                seen.add(name)
                lengths[row], labels[row] = batch["input_ids"].numel(), keep.sum()
        self.lengths, self.tokens, self.data = lengths, int(labels.sum()), digest.hexdigest()
        if not self.tokens:
            raise ValueError(
                "The data has no label, so that there is nothing to capture. See `max_length` and the loss masks."
            )
        order = np.argsort(-lengths, kind="stable")
        order = order[labels[order] > 0]
        shard_of = (np.cumsum(labels[order]) - labels[order]) // shard_tokens
        self.shards = np.split(order, np.flatnonzero(np.diff(shard_of)) + 1)

    def batch(self, rows: list[int]) -> dict[str, Any]:
        """Collates some rows as the trainer does."""
        numbers = np.searchsorted(self._offsets, rows, side="right") - 1
        return self._collate(
            [self._datasets[n][int(row - self._offsets[n])] for n, row in zip(numbers, rows, strict=True)]
        )

    def kept(self, batch: dict[str, Any]) -> torch.Tensor:
        """Returns the mask `(B, L-1)` of the predictions that are trained on: they have a label, and teacher and
        student share it.
        """
        labels = batch["labels"][:, 1:]
        return (labels != -100) & (labels < self._vocabulary)

    def check_packing(self, trainer: TrainerWithTeacher, batch: dict[str, Any]) -> None:
        """Refuses, at the first packed batch, a teacher that lets packed sequences see each other, as training
        does.
        """
        if self._is_checked or not is_packed(batch):
            return
        self._is_checked = True
        leak = trainer.teacher.measure_leak(batch)
        if leak.ratio > 1:
            raise ValueError(leak_message(trainer.teacher.model, leak))

    def batches(self, rows: np.ndarray, batch_tokens: int) -> Iterator[dict[str, Any]]:
        """Collates rows that go from long to short in batches of up to so many tokens."""
        while len(rows):
            size = max(1, batch_tokens // int(self.lengths[rows[0]]))
            yield self.batch(rows[:size].tolist())
            rows = rows[size:]


def _datasets(trainer: TrainerWithTeacher) -> list[Dataset]:
    evaluation = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    datasets: list[Any] = [dataset for dataset in (trainer.train_dataset, *evaluation.values()) if dataset is not None]
    if not all(isinstance(dataset, Dataset) for dataset in datasets):
        raise ValueError("A streamed dataset cannot be captured. Set `dataset_streaming: false`.")
    return datasets


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
