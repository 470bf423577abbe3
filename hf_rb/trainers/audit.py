"""Every way in which a distillation trainer computes a loss, compared with the formulas on all logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from hf_rb.ops import lm_head
from hf_rb.ops.backbone import model_inputs, width_of
from hf_rb.ops.sequences import Sequences
from hf_rb.teachers import CachedTeacher, LocalTeacher, cache_teacher
from hf_rb.trainers.common.distilling import compared_rows
from hf_rb.trainers.common.gopd import RoutedTeacher, copy_of
from hf_rb.trainers.distillation.trainer import DistillationTrainer, loss_mask, whole_sequences
from hf_rb.trainers.gkd.trainer import GKDTrainer
from hf_rb.utils import compat


__all__ = ["Comparison", "audit"]

Batch = dict[str, Any]
Loss = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """Distance of a path from the dense reference, at most, over all batches.

    Attributes:
        path (`str`):
            What computed the loss.
        loss (`float`):
            Difference of the loss, relative to the reference where that is above 1.
        gradient (`float`):
            Difference of any entry of the gradient, relative to the largest entry of the reference's.
    """

    path: str
    loss: float
    gradient: float


def audit(
    trainer: DistillationTrainer | GKDTrainer, batches: int = 2, captured: LocalTeacher | None = None
) -> list[Comparison]:
    """
    Compares the paths of a trainer on batches of its training data: the loss as the trainer computes it, in small
    tiles, one sequence at a time, with more padding, and for packed batches unpacked. Last comes a student that is its
    own teacher and reference, whose loss and gradient must be zero (HPD has no such case, and is left out).

    Of a cached teacher, the reference is the formulas on what the cache holds. With the model that was `captured`,
    prepared, a cache of all its tokens is made for the same batches, and compared with the formulas on its logits.

    The trainer's model keeps its weights; dropout is switched off. The load-balancing loss of a mixture of experts
    does not add up over sequences: it is compared by itself, on whole batches, with the weight 1.

    Args:
        trainer ([`DistillationTrainer`] or [`GKDTrainer`]):
            The trainer.
        batches (`int`, *optional*, defaults to `2`):
            Number of batches.
        captured ([`~hf_rb.teachers.LocalTeacher`], *optional*):
            The model whose cache the trainer's teacher reads.
    """
    compat.disable_dropout_in_model(trainer.model)
    run: Any = trainer  # of which only GKD's has a balance loss
    has_auxiliary_loss = getattr(run, "aux_loss_enabled", False)
    if has_auxiliary_loss:
        run.aux_loss_enabled = False
    trainer.model.train()
    paths = _paths(trainer)
    differences: dict[str, list[tuple[float, float]]] = {}
    if captured is not None:  # all tokens of all rows would be much to store
        rows = min(batches * trainer.args.train_batch_size, len(run.train_dataset))
        run.train_dataset = run.train_dataset.select(range(rows))
    kept = [batch for batch, _ in zip(paths.batches(), range(batches), strict=False)]
    largest = []
    for batch in kept:
        reference = _loss_and_gradient(trainer, paths.dense, [batch])
        largest.append(_largest(reference[1]))
        for name, loss, parts in paths.variants(batch):
            found = _loss_and_gradient(trainer, loss, parts)
            differences.setdefault(name, []).append(_difference(found, reference))
    if has_auxiliary_loss and type(paths) is _GkdPaths:
        differences["balance loss"] = _balance_losses(trainer, paths, kept)
    if captured is not None:
        differences["cache of all tokens"] = _cache_of_all_tokens(trainer, captured, kept)
    if trainer.objective.vanishes:
        paths.make_student_its_teacher()
        for batch, scale in zip(kept, largest, strict=True):
            loss, gradient = _loss_and_gradient(trainer, paths.loss, [paths.seen_by_student(batch)])
            differences.setdefault("student = teacher", []).append((abs(loss), _largest(gradient) / (scale or 1.0)))
    return [Comparison(name, *map(max, zip(*pairs, strict=True))) for name, pairs in differences.items()]


def _balance_losses(trainer: Any, paths: "_GkdPaths", batches: list[Batch]) -> list[tuple[float, float]]:
    weight, trainer.router_aux_loss_coef, trainer.aux_loss_enabled = trainer.router_aux_loss_coef, 1.0, True
    trainer.current_gradient_accumulation_steps = 1  # which only training sets
    pairs = [[_loss_and_gradient(trainer, loss, [batch]) for loss in (paths.loss, paths.dense)] for batch in batches]
    trainer.router_aux_loss_coef, trainer.aux_loss_enabled = weight, False
    return [_difference(*pair) for pair in pairs]


def _cache_of_all_tokens(trainer: Any, teacher: LocalTeacher, batches: list[Batch]) -> list[tuple[float, float]]:
    stored, paths = trainer.teacher, _GkdPaths(trainer)
    trainer.teacher = teacher
    references = [_loss_and_gradient(trainer, paths.dense, [batch]) for batch in batches]
    with TemporaryDirectory() as folder:
        cache_teacher(trainer, folder, k=teacher.vocabulary or width_of(trainer.model), dtype="float32")
        trainer.teacher = CachedTeacher(folder)
        trainer.teacher.prepare(trainer)
        found = [_loss_and_gradient(trainer, paths.loss, [batch]) for batch in batches]
    trainer.teacher = stored
    return list(map(_difference, found, references))


def _loss_and_gradient(trainer: Any, loss: Loss, parts: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """Adds up the parts of a batch, as accumulation does."""
    trainer.model.zero_grad()
    total = 0.0
    for part in parts:
        value = loss(part)
        value.backward()
        total += value.item()
    return total, [one.grad.clone() for one in trainer.model.parameters() if one.grad is not None]


def _largest(gradient: list[torch.Tensor]) -> float:
    return max((part.abs().max().item() for part in gradient), default=0.0)


def _difference(
    found: tuple[float, list[torch.Tensor]], reference: tuple[float, list[torch.Tensor]]
) -> tuple[float, float]:
    (loss, gradient), (expected_loss, expected) = found, reference
    apart = max(((one - two).abs().max().item() for one, two in zip(gradient, expected, strict=True)), default=0.0)
    return abs(loss - expected_loss) / max(1.0, abs(expected_loss)), apart / (_largest(expected) or 1.0)


class _Paths:
    """Ways to compute the loss of a batch; `right` gives the padding of the tensors that run along completions."""

    right: dict[str, float]

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def batches(self) -> Iterator[Batch]:
        """Yields batches of the training data, each with the number of its tokens."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> torch.Tensor:
        """Returns the loss as the trainer computes it."""
        raise NotImplementedError

    def dense(self, batch: Batch) -> torch.Tensor:
        """Returns the loss by the formulas on all logits."""
        raise NotImplementedError

    def variants(self, batch: Batch) -> Iterator[tuple[str, Loss, list[Batch]]]:
        yield "as trained", self.loss, [batch]
        yield "tiles of 7 tokens", self._in_small_tiles, [batch]
        rows = self._rows(batch)
        if len(rows) > 1:
            yield "one sequence at a time", self.loss, rows
        if "position_ids" not in batch:
            yield "more padding", self.loss, [self._padded(batch)]

    def _in_small_tiles(self, batch: Batch) -> torch.Tensor:
        with _tile_rows(7, self.trainer.model.config.get_text_config().vocab_size):
            return self.loss(batch)

    def _padded(self, batch: Batch) -> Batch:
        return batch | {key: pad(batch[key], (0, 5), value=value) for key, value in self.right.items() if key in batch}

    def _rows(self, batch: Batch) -> list[Batch]:
        size = len(next(iter(batch.values())))
        return [
            {
                key: value[row : row + 1] if value.ndim else value
                for key, value in batch.items()
                if torch.is_tensor(value)
            }
            for row in range(size)
        ]

    def seen_by_student(self, batch: Batch) -> Batch:
        return batch

    def make_student_its_teacher(self) -> None:
        trainer = self.trainer
        student = trainer.accelerator.unwrap_model(trainer.model)
        twin = LocalTeacher(copy_of(student), tokenizer=trainer.processing_class)
        twin.prepare(trainer)
        twin.vocabulary = trainer.teacher.vocabulary  # the ids that the trainer goes on to compare
        trainer.teacher = twin
        if trainer.reference is not None:
            trainer.reference = twin
        trainer.objective = trainer.objective.alone()


def _paths(trainer: Any) -> _Paths:
    if isinstance(trainer, DistillationTrainer):
        return _DistillationPaths(trainer)
    return _CachedPaths(trainer) if isinstance(trainer.teacher, CachedTeacher) else _GkdPaths(trainer)


@contextmanager
def _tile_rows(rows: int, vocabulary: int) -> Iterator[None]:
    before = lm_head.TILE_BYTES
    lm_head.TILE_BYTES = dict.fromkeys(before, (4 * vocabulary * rows,) * 2)
    try:
        yield
    finally:
        lm_head.TILE_BYTES = before


class _GkdPaths(_Paths):
    right = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def batches(self) -> Iterator[Batch]:
        trainer = self.trainer
        writer = trainer._writer()
        for batch in trainer.get_train_dataloader():
            batch = batch if writer is None else trainer._with_completions(batch, writer)
            yield batch | {"items": trainer._get_num_items_in_batch([batch], trainer.accelerator.device)}

    def loss(self, batch: Batch) -> torch.Tensor:
        inputs = {key: value for key, value in batch.items() if key != "items"}
        return self.trainer.compute_loss(self.trainer.model, inputs, num_items_in_batch=batch["items"])

    def dense(self, batch: Batch) -> torch.Tensor:
        args = self.trainer.args
        before, args.loss_impl = args.loss_impl, "dense"
        try:
            return self.loss(batch)
        finally:
            args.loss_impl = before

    def _rows(self, batch: Batch) -> list[Batch]:
        """The sequences of a batch, packed or padded."""
        flat = {key: batch[key].flatten() for key in ("input_ids", "labels")}
        spans = Sequences(batch).spans()
        sequences = [{key: value[start:end].unsqueeze(0) for key, value in flat.items()} for start, end in spans]
        for sequence in sequences:
            sequence["labels"] = sequence["labels"].clone()
            sequence["labels"][:, 0] = -100  # of a packed row, nothing predicts a sequence's first token
            sequence |= {"attention_mask": torch.ones_like(sequence["input_ids"]), "items": batch["items"]}
        return sequences

    def variants(self, batch: Batch) -> Iterator[tuple[str, Loss, list[Batch]]]:
        yield from super().variants(batch)
        if "position_ids" in batch:
            rows = self._rows(batch)
            yield (
                "unpacked",
                self.loss,
                [
                    {
                        key: pad_sequence([row[key][0] for row in rows], batch_first=True, padding_value=value)
                        for key, value in self.right.items()
                    }
                    | {"items": batch["items"]}
                ],
            )


class _CachedPaths(_GkdPaths):
    def dense(self, batch: Batch) -> torch.Tensor:
        trainer = self.trainer
        labels = trainer._trained_labels(batch)[:, 1:]
        keep = labels != -100
        events = trainer.teacher.score(batch, keep)
        logits = trainer.model(**model_inputs(batch), use_cache=False).logits[:, :-1][keep]
        tokens = {"labels": (events.ids == labels[keep].unsqueeze(-1)).int().argmax(-1)}
        log_q, log_p = _on_events(logits[:, : trainer.teacher.vocabulary], events)
        if log_p.shape[-1] > events.ids.shape[-1]:
            tokens["rest"] = events.rest
        losses = trainer.objective.dense(log_q, log_p, tokens)
        return (trainer._weights(keep, batch["items"].clamp(min=1)) * losses).sum()


def _on_events(logits: torch.Tensor, events: lm_head.CachedLogits) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probabilities of student and teacher for each of a cache's events: its ids, and all others
    together.
    """
    log_q, ids = logits.float().log_softmax(-1), events.ids.long()
    known = log_q.gather(-1, ids)
    if ids.shape[-1] == log_q.shape[-1]:
        return known, events.log_probs
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([known, rest], -1), torch.cat([events.log_probs, events.rest.unsqueeze(-1)], -1)


class _DistillationPaths(_Paths):
    right = {"completion_ids": 0, "completion_mask": 0, "tool_mask": 1, "sampler_logp": 0.0}

    def batches(self) -> Iterator[Batch]:
        trainer = self.trainer
        for batch in trainer.get_train_dataloader():
            yield trainer._generate_and_score_completions(batch)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.trainer.compute_loss(self.trainer.model, batch)

    def dense(self, batch: Batch) -> torch.Tensor:
        trainer = self.trainer
        mask = loss_mask(batch)
        shared = slice(trainer.teacher.vocabulary)
        length = batch["completion_ids"].shape[1]

        def chosen(logits: torch.Tensor) -> torch.Tensor:
            return logits[:, -length - 1 : -1][mask][:, shared].float() / trainer.temperature

        prompt = "teacher_prompt" if "teacher_prompt_ids" in batch else "prompt"
        rows = chosen(trainer.model(**whole_sequences(batch, "prompt"), use_cache=False).logits)
        teacher_rows = self._teacher_rows(whole_sequences(batch, prompt), batch, chosen, mask)
        tokens = {"labels": batch["completion_ids"][mask]}
        reference_rows = None
        if trainer.reference is not None:
            prompt = "prompt" if trainer.reference_is_start else prompt
            reference_rows = chosen(trainer.reference.logits(whole_sequences(batch, prompt)))
        teacher_rows = compared_rows(trainer.objective, teacher_rows, reference_rows, tokens)
        losses = trainer.objective.dense(rows, teacher_rows, tokens)
        weights = trainer._token_weights(mask, batch, batch["num_items_in_batch"] / trainer.accelerator.num_processes)
        return (weights[mask] * losses).sum()

    def _teacher_rows(self, inputs: Batch, batch: Batch, chosen: Callable, mask: torch.Tensor) -> torch.Tensor:
        teacher = self.trainer.teacher
        if not isinstance(teacher, RoutedTeacher):
            return chosen(teacher.logits(inputs))
        by_name = torch.stack([chosen(one.logits(inputs)) for one in teacher.teachers.values()])
        route = batch["route"].unsqueeze(1).expand_as(mask)[mask]
        return by_name[route, torch.arange(len(route), device=route.device)]

    def seen_by_student(self, batch: Batch) -> Batch:
        return {key: value for key, value in batch.items() if not key.startswith(("teacher_prompt", "route"))}

    def make_student_its_teacher(self) -> None:
        super().make_student_its_teacher()
        if self.trainer.teacher_model is not None:  # TRL's loss
            self.trainer.teacher_model = self.trainer.teacher.wrapped
