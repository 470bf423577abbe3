"""On-policy distillation: TRL's trainer with other objectives, among them G-OPD with its reference and its
teachers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, TrainingArguments
from trl import is_conversational

from hf_rb.objectives.objective import Divergence
from hf_rb.ops.backbone import name_of, width_of
from hf_rb.ops.lm_head import TeacherLogits, lm_head_loss
from hf_rb.ops.logit_source import LogitSource
from hf_rb.ops.sequences import Sequences
from hf_rb.teachers import LocalTeacher, ModelTeacher, build_teacher
from hf_rb.trainers.common.configs import own_config
from hf_rb.trainers.common.distilling import (
    build_objective,
    compared_rows,
    init_kwargs_of,
    mixed_logits,
    sampled_stats,
)
from hf_rb.trainers.common.generation import OwnDistributionMixin, SamplerLogProbs
from hf_rb.trainers.common.gopd import RoutedTeacher, given_reference, make_reference, share_vocabulary, token_weights
from hf_rb.trainers.common.metrics import check_finite, log_token_metrics
from hf_rb.trainers.common.mixin import TrainerMixin
from hf_rb.trainers.common.token_samples import TokenStats
from hf_rb.trainers.distillation.config import DistillationConfig


__all__ = ["DistillationTrainer", "loss_mask", "whole_sequences"]

Model = str | PreTrainedModel
_DTYPE = {"dtype": None}  # of a model given by name, TRL's default


class DistillationTrainer(OwnDistributionMixin, TrainerMixin, trl.DistillationTrainer):
    """
    Trainer for distillation on the student's own completions. Takes what [`~trl.DistillationTrainer`] takes; with
    `objective="jsd"` it is that trainer, unless the logits of student or teacher are not hidden states times LM head,
    which TRL's loss takes them for: the first step compares the two, and such a model gets its own logits, with a
    warning. Generation (transformers or vLLM), tools, masks and batches are the parent's in every case.

    `DistillationConfig(objective="gopd", reward_scale=1.25)` trains with ExOPD, generalized on-policy distillation
    with an extrapolated reward (https://huggingface.co/papers/2602.12125): of the tokens that the student has drawn,
    those that the teacher likes better than the reference does are made more probable. With `reward_scale=1` it is
    on-policy distillation by sampled tokens. A teacher whose chat template is another than the student's reads prompts
    in its own.

    `docs/methods.md` lists the numbers that are logged beside TRL's, over all trained tokens since the last log
    (`eval_` before them in evaluation). Where the loss is TRL's own there are none.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers, **kwargs:
            As for [`~trl.DistillationTrainer`].
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or `dict`, *optional*):
            Teacher; with `args.gopd_teacher_column`, teachers by the names in that column. Defaults to
            `args.teacher_model_name_or_path`. Its logits may be padded to another width than the student's.
        teacher ([`~hf_rb.teachers.Teacher`], *optional*):
            Where the teacher's scores come from, in place of `teacher_model`.
        reference_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Reference of `objective="gopd"`, in place of `args.reference_model_name_or_path`.

    Raises:
        ValueError: No teacher or two, a teacher on another tokenizer, or a reference that cannot act or cannot be
            made. In training, a loss that is not finite.
        TypeError: A teacher that knows only what it has stored, such as a cache.
    """

    args: DistillationConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    teacher: Any  # a `ModelTeacher`, or a `RoutedTeacher` of several
    reference: Any  # a `ModelTeacher`, or `None`
    objective: Any  # an `Objective`

    def __init__(
        self,
        model: Model,
        teacher_model: Model | dict[str, Model] | None = None,
        args: DistillationConfig | TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        *,
        teacher: ModelTeacher | None = None,
        reference_model: Model | None = None,
        **kwargs: Any,
    ):
        args = own_config(DistillationConfig, args, model, "Distillation")
        # All that can be wrong with them before a model is loaded.
        self.objective = build_objective(args)
        given = _teacher(teacher, teacher_model, args)
        reference_model = given_reference(args, self.objective, reference_model)
        super().__init__(
            model, None, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers, **kwargs
        )
        self.teacher = given
        self.teacher.prepare(self)
        self.reference = make_reference(self, reference_model, **_DTYPE)
        self.reference_is_start = reference_model is None
        if self.reference is not None:
            self.reference.prepare(self)
        self._student_logits = LogitSource()
        self._sampler = SamplerLogProbs(self.vllm_generation) if args.gopd_tis_cap is not None else None
        self._vocabulary = share_vocabulary(self)
        if args.objective == "jsd" and isinstance(given, LocalTeacher):
            if width_of(given.model) == width_of(self.model) == self._vocabulary:
                self.teacher_model = given.wrapped  # the parent's loss reads it

    @property
    def _methods(self) -> list[str]:
        return [self.objective.method.key] if self.objective.method.paper else []

    # What a generation batch holds beside the parent's tensors

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.args.objective != "jsd" and "num_images" in output:
            raise ValueError(
                f"`objective: {self.args.objective}` reads text, and the dataset has images. Set `objective: jsd`, "
                "or remove the images."
            )
        if self._vocabulary is not None and width_of(self.model) > self._vocabulary:
            self._check_ids(output["completion_ids"], self._vocabulary)
        if self.objective.aggregation != "token-mean":
            output["num_sequences_in_batch"] = self.accelerator.gather(loss_mask(output).any(1).sum()).sum()
        if self.objective.method.completions == "student":
            self._add_rollouts(output, inputs)
        return output

    def _check_ids(self, ids: torch.Tensor, vocabulary: int) -> None:
        """Refuses what vLLM may sample, which is not told to leave the padding of the vocabulary out."""
        if (ids >= vocabulary).any():
            raise ValueError(
                f"The student has written the id {ids.max()}, and student, teacher and reference share "
                f"{vocabulary:,}: the others cannot read it. Generate without vLLM (`use_vllm: false`), which leaves "
                f"such ids out, or cut the student to size first (`resize_token_embeddings({vocabulary})`)."
            )

    def _add_rollouts(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        device = self.accelerator.device
        names = [None] * len(inputs)
        if self.args.gopd_teacher_column is not None:
            names = [self._teacher_name(row) for row in inputs]
            output["route"] = torch.tensor([self.teacher.names.index(name) for name in names], device=device)
        prompts = self._teacher_prompts([row["prompt"] for row in inputs], names)
        if prompts is not None:
            output["teacher_prompt_ids"], output["teacher_prompt_mask"] = _padded(
                prompts, self._tokenizer.pad_token_id, "left", device
            )
        if self._sampler is not None:
            rows = (
                (prompt[prompt_mask.bool()].tolist(), completion[completion_mask.bool()].tolist())
                for prompt, prompt_mask, completion, completion_mask in zip(
                    *(output[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
                    strict=True,
                )
            )
            log_probs, _ = _padded(self._sampler.collect(rows), 0.0, "right", device)
            width = output["completion_ids"].shape[1]
            output["sampler_logp"] = pad(log_probs, (0, width - log_probs.shape[1]))

    def _teacher_name(self, row: Mapping[str, Any]) -> str:
        column, names = str(self.args.gopd_teacher_column), self.teacher.names
        if row.get(column) not in names:
            raise ValueError(
                f"`gopd_teacher_column: {column}` names a teacher for each example, and an example has "
                f"{row.get(column)!r}. The teachers are {', '.join(map(repr, names))}."
            )
        return row[column]

    def _teacher_prompts(self, prompts: list, names: Sequence[str | None]) -> list[list[int]] | None:
        """Prompts in the chat template of each one's teacher, or `None` if no teacher's template differs from the
        student's.
        """
        if not is_conversational({"prompt": prompts[0]}):
            return None
        own: Any = self._tokenizer
        by_name = self.teacher.teachers if self.args.gopd_teacher_column is not None else {None: self.teacher}
        tokenizers: dict[Any, Any] = {name: _chat_tokenizer(teacher) or own for name, teacher in by_name.items()}
        if all(tokenizer.chat_template == own.chat_template for tokenizer in tokenizers.values()):
            return None
        return [
            tokenizers[name].apply_chat_template(
                prompt,
                tools=self.tools or None,
                chat_template=self.chat_template if tokenizers[name].chat_template == own.chat_template else None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.chat_template_kwargs,
            )["input_ids"]
            for prompt, name in zip(prompts, names, strict=True)
        ]

    # The loss

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        if self.teacher_model is not None and self._can_be_trl(unwrapped_student, inputs):
            result = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
            check_finite(self.args.objective, self.state.global_step, result[0])
            return result
        # The redirected forward, in which this runs, is without the model's autocast.
        with self.accelerator.autocast():
            return self._our_loss(unwrapped_student, inputs, num_items_in_batch)

    def _can_be_trl(self, student: Any, inputs: Mapping[str, Any]) -> bool:
        """Returns whether TRL's loss, which multiplies hidden states by LM heads, has the logits of student and
        teacher right.
        """
        with self.accelerator.autocast():
            # Both, as all processes have to take part.
            is_head = [self._student_logits.is_head(student), self.teacher.is_head()]
        if not all(is_head) and any(key.startswith(("pixel_", "image_")) for key in inputs):
            model = student if not is_head[0] else self.teacher.model
            raise ValueError(
                f"The logits of {name_of(model)} are not its last hidden states times its LM head, and for such a "
                "model `DistillationTrainer` reads text alone, while the dataset has images. Remove the images, or "
                "use another model."
            )
        return all(is_head)

    def _our_loss(
        self, unwrapped_student: Any, inputs: Mapping[str, Any], num_items_in_batch: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = whole_sequences(inputs, "prompt")
        length = inputs["completion_ids"].shape[1]
        if self._student_logits.is_head(unwrapped_student):
            hidden = self._get_last_hidden_state(
                unwrapped_student, batch["input_ids"], batch["attention_mask"], length
            )
        else:
            hidden = self._student_logits.output(unwrapped_student, batch)[0][:, -length - 1 : -1]
        mask = loss_mask(inputs)
        weights = self._token_weights(mask, inputs, num_items_in_batch)
        tokens, teacher = self._score(inputs, mask)
        with self._student_logits.head(unwrapped_student) as head:
            # With the model split by `device_map`, the backbone may end on another device than the head.
            states = hidden[mask.to(hidden.device)].to(head.device)
            scored = lm_head_loss(
                states,
                head,
                self.objective,
                tokens,
                teacher,
                weights[mask].to(states.device),
                self.temperature,
                self._vocabulary,
            )
        check_finite(self.args.objective, self.state.global_step, scored.loss, scored.stats["loss"])
        entropy = scored.stats.pop("entropy").sum()  # the parent logs it
        log_token_metrics(self, scored.stats, batch["attention_mask"])
        return scored.loss, entropy, mask.sum()

    def _token_weights(
        self, mask: torch.Tensor, inputs: Mapping[str, Any], num_items_in_batch: torch.Tensor | None
    ) -> torch.Tensor:
        sequences = None  # in evaluation, a mean over the batch, as the parent's
        if num_items_in_batch is not None and "num_sequences_in_batch" in inputs:
            sequences = inputs["num_sequences_in_batch"] / self.accelerator.num_processes
        return token_weights(mask, self.objective.aggregation, num_items_in_batch, sequences)

    def _score(
        self, inputs: Mapping[str, Any], mask: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], list[TeacherLogits] | None]:
        """Returns what the rule reads about each trained token, and the teacher's logits, in two parts with a
        reference.
        """
        (seen, keep), (seen_by_reference, reference_keep) = self._seen(inputs, mask)
        tokens = {} if isinstance(self.objective, Divergence) else self._tokens(inputs, mask)
        if not self.objective.sampled:
            teacher = self.teacher.score(seen, keep)
            if self.reference is None:
                return tokens, teacher
            reference = self.reference.score(seen_by_reference, reference_keep)
            return tokens, mixed_logits(self.objective, teacher, reference)
        labels = tokens["labels"]
        tokens["teacher_logp"] = self.teacher.log_probs(seen, keep, labels)
        if self.reference is not None:
            tokens["reference_logp"] = self.reference.log_probs(seen_by_reference, reference_keep, labels)
        return tokens, None

    def _tokens(self, inputs: Mapping[str, Any], mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns what an objective reads of each trained token beside the models."""
        tokens = {"labels": inputs["completion_ids"][mask]}
        if self.objective.draws:
            draws = Sequences(whole_sequences(inputs, "prompt")).uniforms(self.args.seed, self.state.global_step)
            tokens["uniforms"] = draws[:, -mask.shape[1] :][mask]
        if self._sampler is not None:
            tokens["sampler_logp"] = inputs["sampler_logp"][mask]
        return tokens

    def _seen(
        self, inputs: Mapping[str, Any], mask: torch.Tensor
    ) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Returns what teacher and reference read, each with the positions that predict the trained tokens."""
        seen = whole_sequences(inputs, "teacher_prompt" if "teacher_prompt_ids" in inputs else "prompt")
        if "route" in inputs:
            seen["route"] = inputs["route"]
        seen_by_reference = whole_sequences(inputs, "prompt") if self.reference and self.reference_is_start else seen
        return [(batch, _keep(mask, batch["input_ids"].shape[1])) for batch in (seen, seen_by_reference)]

    @property
    def has_token_stats(self) -> bool:
        return hasattr(self.teacher, "logits")  # not several teachers

    def token_stats(self, inputs: Mapping[str, Any]) -> TokenStats:
        """Returns of every token that is trained on what the objective reports of it, and how alike student and
        teacher are there.
        """
        mask, own = loss_mask(inputs), whole_sequences(inputs, "prompt")
        keep = _keep(mask, own["input_ids"].shape[1])
        (seen, seen_keep), (seen_by_reference, reference_keep) = self._seen(inputs, mask)

        def rows(logits: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return logits[:, :-1][keep][..., : self._vocabulary] / self.temperature

        student_rows = rows(self.model_wrapped(**own, use_cache=False).logits, keep)
        teacher_rows, reference_rows = rows(self.teacher.logits(seen), seen_keep), None
        if self.reference is not None:
            reference_rows = rows(self.reference.logits(seen_by_reference), reference_keep)
        tokens = self._tokens(inputs, mask)
        teacher_rows = compared_rows(self.objective, teacher_rows, reference_rows, tokens)
        return TokenStats(own["input_ids"], keep, sampled_stats(self.objective, student_rows, teacher_rows, tokens))


def _teacher(teacher: Any, model: Any, args: DistillationConfig) -> Any:
    model = args.teacher_model_name_or_path if model is None else model
    if isinstance(model, Mapping) and teacher is None:
        teacher, model = (
            RoutedTeacher({name: LocalTeacher(one, _init_kwargs(one, args)) for name, one in model.items()}),
            None,
        )
    teacher = build_teacher(teacher, model, init_kwargs=_init_kwargs(model, args))
    if not hasattr(teacher, "log_probs"):
        raise TypeError(
            f"`teacher` is a {type(teacher).__name__}, which knows what it has stored, and the student's completions "
            "are new. Pass a model, or use `GKDTrainer` with `lmbda=0`, which trains on the completions of the "
            "dataset."
        )
    if isinstance(teacher, RoutedTeacher) != (args.gopd_teacher_column is not None):
        raise ValueError(
            f"`gopd_teacher_column: {args.gopd_teacher_column}` names the column that chooses among several "
            "teachers: it goes with teachers by name, `teacher_model_name_or_path: {math: ..., code: ...}`, and "
            "they with it."
        )
    return teacher


def _init_kwargs(model: Any, args: DistillationConfig) -> Any:
    if not isinstance(model, str):
        return args.teacher_model_init_kwargs
    revision = {} if args.teacher_model_revision is None else {"revision": args.teacher_model_revision}
    return _DTYPE | revision | init_kwargs_of(args)


def loss_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Returns which completion tokens (B, C) are trained on: not padding, and not what a tool has said."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def whole_sequences(inputs: Mapping[str, Any], prompt: str) -> dict[str, torch.Tensor]:
    """Returns a model's inputs: one of the two renderings of the prompts, and the completions."""
    return {
        "input_ids": torch.cat([inputs[f"{prompt}_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs[f"{prompt}_mask"], inputs["completion_mask"]], dim=1),
    }


def _keep(mask: torch.Tensor, length: int) -> torch.Tensor:
    """Returns which positions (B, length - 1) predict the trained tokens of `mask` (B, C), the last C of each row."""
    return pad(mask, (length - 1 - mask.shape[1], 0))


def _chat_tokenizer(teacher: ModelTeacher) -> PreTrainedTokenizerBase | None:
    tokenizer = getattr(teacher, "tokenizer", None)
    return tokenizer if getattr(tokenizer, "chat_template", None) else None


def _padded(rows: list[list], value: float, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows of unequal lengths as one tensor, with a mask of what is not padding."""
    length = max(map(len, rows))

    def fill(row: list, value: float) -> list:
        gap = [value] * (length - len(row))
        return gap + row if side == "left" else row + gap

    filled = torch.tensor([fill(row, value) for row in rows], device=device)
    return filled, torch.tensor([fill([1] * len(row), 0) for row in rows], device=device)
