"""Distillation on dataset completions, the student's own, or both: TRL's GKD with more objectives, teachers, data."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments

from hf_rb.objectives.standard import JSD
from hf_rb.ops.backbone import model_inputs, width_of
from hf_rb.ops.generation import generation_config
from hf_rb.ops.lm_head import CachedLogits, TeacherLogits, lm_head_loss
from hf_rb.ops.logit_source import LogitSource
from hf_rb.ops.sequences import Sequences
from hf_rb.ops.wide_head import wide_heads
from hf_rb.teachers import CachedTeacher, Teacher, build_teacher
from hf_rb.trainers.common.configs import own_config
from hf_rb.trainers.common.distilling import (
    build_objective,
    compared_rows,
    dense_stats,
    init_kwargs_of,
    mixed_logits,
    sampled_stats,
)
from hf_rb.trainers.common.gopd import given_reference, make_reference, share_vocabulary, token_weights
from hf_rb.trainers.common.metrics import check_finite, log_token_metrics
from hf_rb.trainers.common.mixin import TrainerMixin
from hf_rb.trainers.common.packing import check_packing
from hf_rb.trainers.common.routers import auxiliary_loss_of
from hf_rb.trainers.common.token_samples import TokenStats
from hf_rb.trainers.gkd.config import GKDConfig
from hf_rb.trainers.gkd.data import in_layout_of_sft
from hf_rb.trainers.gkd.rules import cache_rules
from hf_rb.trainers.gkd.sampling import SamplingGKD
from hf_rb.utils import compat
from hf_rb.utils.fields import validate


__all__ = ["GKDTrainer"]

logger = logging.getLogger(__name__)


class GKDTrainer(TrainerMixin, SamplingGKD):
    """
    Trainer for distillation. Takes what TRL's `GKDTrainer` takes, and any data that [`SFTTrainer`] takes.

    It differs from TRL's trainer where that one is wrong or wasteful:

    - The loss is divided by the tokens that are trained on, over accumulation steps and processes: completions for a
      whole step are sampled before its tokens are counted, and the gradient does not depend on the number of
      processes.
    - No logits are kept; see `loss_impl`. With `loss_impl="dense"`, `lmbda=0` and one process, losses and gradients of
      `objective="jsd"` are TRL's, bit for bit.
    - Whether a step trains on the dataset, the student's or (with `seq_kd`) the teacher's completions is drawn once an
      optimizer step from the seed and the step, the same on all processes.
    - `messages` are labelled as TRL's collator does, the last turn; with `assistant_only_loss=True` every assistant
      turn. Prompt-completion and tokenized data, packing and padding-free batches work too; and with `lmbda=1` prompts
      alone.
    - Teacher and student may differ in the padding of their vocabulary. Labels outside the shared ids are left out.

    `docs/methods.md` lists the numbers that are logged, over all tokens since the last log. `eval_` stands before them
    in evaluation, where `loss` is the objective on the evaluation data.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher, of any width. Defaults to `args.teacher_model_name_or_path`.
        teacher ([`~hf_rb.teachers.Teacher`], *optional*):
            Another source of the teacher's distributions, in its place.
        reference_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Reference of `objective="gopd"`. Defaults to `args.reference_model_name_or_path`, and that to the student
            at its start.

    Raises:
        ValueError: No teacher, or more than one; a teacher with other tokens; a reference that cannot act; a
            prompt-learning adapter, context or sequence parallelism, a `compute_loss_func`; images; data without
            anything to train on. In training: a loss that is not finite, or a model that lets packed sequences see
            each other.
    """

    args: GKDConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    teacher: Any  # a `Teacher`; the objective decides what else it must be able to do
    reference: Any  # a `ModelTeacher`, or `None`
    objective: Any  # an `Objective`

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: GKDConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        teacher: Teacher | None = None,
        reference_model: str | PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        args = own_config(GKDConfig, args, model, "GKD")
        self.objective = build_objective(args)
        self.teacher = _teacher(args, teacher, teacher_model)
        reference_model = given_reference(args, self.objective, reference_model)
        self._has_prompts_only = False
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        self._check_supported()
        self.lmbda, self.beta, self.seq_kd, self.temperature = args.lmbda, args.beta, args.seq_kd, args.temperature
        self._forward_redirection = compat.ForwardRedirection()
        self._student_logits = LogitSource()
        self.generation_config = generation_config(self.model, self._tokenizer, args.max_new_tokens, args.temperature)
        self.reference = make_reference(self, reference_model)
        if args.disable_dropout:
            compat.disable_dropout_in_model(self.model)
        for source in filter(None, (self.teacher, self.reference)):
            source.prepare(self)
        share_vocabulary(self)
        self.teacher_model = getattr(self.teacher, "model", None)
        self._compare_templates()

    def _compare_templates(self) -> None:
        theirs = getattr(getattr(self.teacher, "tokenizer", None), "chat_template", None)
        ours = self._tokenizer.chat_template
        if theirs is not None and ours is not None and theirs != ours:
            logger.warning(
                "Teacher and student have different chat templates, and the teacher reads the tokens of the "
                "student's. Where that is not what it was trained on, set `chat_template_path` to the teacher, or "
                "use `DistillationTrainer`, which renders prompts for each."
            )

    def _check_supported(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` would replace the loss that `objective` names. Remove it.")
        if self._is_vision_dataset:
            raise ValueError("GKDTrainer trains on text, and the dataset has images. Remove the image columns.")
        self._check_sequences("GKDTrainer")

    @property
    def _methods(self) -> list[str]:
        args, is_lora = self.args, hasattr(getattr(self, "model", None), "peft_config")
        methods = [self.objective.method.key] if self.objective.method.paper else []
        methods += ["loca"] if args.loca_alpha is not None else []
        return methods + (["llm_neo"] if args.objective == "forward_kl" and is_lora else [])

    # Data

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable | None,
        dataset_name: str,
    ) -> Any:
        if "input_ids" not in next(iter(dataset)) and formatting_func is None:
            dataset, has_prompts_only = in_layout_of_sft(dataset, args, dataset_name)
            self._has_prompts_only |= has_prompts_only
        if args.completion_only_loss is None:
            self.completion_only_loss = "completion" in next(iter(dataset))
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if next(iter(prepared), None) is None:
            raise ValueError(
                f"No example of the {dataset_name} dataset has a token to train on: every completion is empty or "
                f"lies beyond `max_length: {args.max_length}`. Raise `max_length`, or set `truncation_mode: "
                "keep_end`."
            )
        return prepared

    def _trained_labels(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Returns the labels (B, L) without those outside the vocabulary that teacher and student share."""
        labels, vocabulary = inputs["labels"], self.teacher.vocabulary
        return labels if vocabulary is None else labels.masked_fill(labels >= vocabulary, -100)

    def _tokens(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Returns labels (B, L), which of their predictions (B, L-1) count, and what the rule reads of them."""
        labels = self._trained_labels(inputs)
        keep = labels[:, 1:] != -100
        tokens = {"labels": labels[:, 1:][keep]}
        if self.objective.draws:
            draws = Sequences(inputs).uniforms(self.args.seed, self.state.global_step)
            tokens["uniforms"] = draws[:, 1:][keep]
        return labels, keep, tokens

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        return super()._get_num_items_in_batch(
            [{**batch, "shift_labels": self._counted_labels(batch)} for batch in batch_samples], device
        )

    def _counted_labels(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Returns labels (B, L-1) as many as what divides the loss: trained tokens, or completions that have any."""
        labels = self._trained_labels(inputs)[:, 1:]
        if self.objective.aggregation == "token-mean":
            return labels
        is_label = labels != -100
        return labels.masked_fill(is_label.cumsum(-1) != 1, -100)

    # Completions of a step

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        writer = self._writer()
        if writer is not None:  # before the parent counts the labels
            epoch_iterator = (self._with_completions(batch, writer) for batch in epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _writer(self) -> torch.nn.Module | None:
        """Returns the model that writes the completions of the coming step, `None` if they are the dataset's."""
        draw = random.Random(f"{self.args.seed} {self.state.global_step}").random()
        if draw < self.args.lmbda:
            return self.model_wrapped
        return self.teacher.model if self.args.seq_kd else None

    # Loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        # Prompts alone have no other completions.
        if self.objective.method.completions == "student" or self._has_prompts_only:
            inputs = self._with_completions(self._prepare_inputs(inputs), model)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        check_packing(self, model, inputs)
        labels, keep, tokens = self._tokens(inputs)
        items = num_items_in_batch
        if items is None:
            items = (self._counted_labels(inputs) != -100).sum()
        items = torch.as_tensor(items).clamp(min=1)  # without anything to train on, a finite zero

        if self.args.loss_impl == "dense":
            loss, stats, aux_loss = self._dense_loss(model, inputs, labels, keep, tokens, items)
        else:
            student = self.accelerator.unwrap_model(model)
            # Inside the wrapper's forward, where DDP's hooks fire and FSDP and DeepSpeed have the weights in place.
            loss, stats, aux_loss = self._forward_redirection(
                model, student, self._chunked_loss, student, inputs, keep, tokens, items
            )
        check_finite(self.args.objective, self.state.global_step, loss, stats["loss"])
        self._log_tokens(inputs, labels, keep, stats)

        # As in SFTTrainer: the items are those of all processes, and DDP averages gradients over processes.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if aux_loss is not None:
            self._add_metric("aux_loss", aux_loss, torch.ones_like(aux_loss))
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_inputs(inputs), use_cache=False)

    def _weights(self, keep: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Returns the factor of every trained token (N,) in the loss."""
        return token_weights(keep, self.objective.aggregation, tokens=items, sequences=items)[keep]

    def _chunked_loss(
        self,
        student: PreTrainedModel,
        inputs: Mapping[str, Any],
        keep: torch.Tensor,
        tokens: dict[str, torch.Tensor],
        items: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """Returns the loss, what the rule reports of every token, and the balance loss of a mixture of experts."""
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with self.accelerator.autocast():
            teacher = self._score(inputs, keep, tokens)
            hidden, output = self._student_logits.output(student, inputs, **router)
            aux_loss = auxiliary_loss_of(student, output, inputs) if router else None
            with self._student_logits.head(student) as head:
                scored = lm_head_loss(
                    hidden[:, :-1][keep],
                    head,
                    self.objective,
                    tokens,
                    teacher,
                    self._weights(keep, items),
                    vocabulary=self.teacher.vocabulary,
                )
        return scored.loss, scored.stats, aux_loss

    def _score(
        self, inputs: Mapping[str, Any], keep: torch.Tensor, tokens: dict[str, torch.Tensor]
    ) -> list[TeacherLogits] | CachedLogits | None:
        """Returns what the loop takes as teacher, and adds to `tokens` what the rule needs of it."""
        labels = tokens["labels"]
        if self.objective.sampled:
            tokens["teacher_logp"] = self.teacher.log_probs(inputs, keep, labels)
            if self.reference is not None:
                tokens["reference_logp"] = self.reference.log_probs(inputs, keep, labels)
            return None
        teacher = self.teacher.score(inputs, keep)
        if isinstance(teacher, CachedLogits):
            tokens["label_event"] = (teacher.ids == labels.unsqueeze(-1)).int().argmax(-1)
        if self.reference is None:
            return teacher
        return mixed_logits(self.objective, teacher, self.reference.score(inputs, keep))

    def _dense_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        labels: torch.Tensor,
        keep: torch.Tensor,
        tokens: dict[str, torch.Tensor],
        items: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """Returns what [`_chunked_loss`] does, from all logits."""
        objective, shared = self.objective, slice(self.teacher.vocabulary)
        # Then the logits too are TRL's.
        is_trl = type(objective) is JSD and objective.kd_alpha == 1 and objective.loca_alpha is None
        sources = [source for source in (self.teacher, self.reference) if hasattr(source, "model")]
        models: list[Any] = [self.accelerator.unwrap_model(model), *(source.model for source in sources)]
        with wide_heads(*([] if is_trl else models)):
            teacher_logits = self.teacher.logits(inputs)[..., shared]
            reference_logits = None if self.reference is None else self.reference.logits(inputs)[..., shared]
            router = {"output_router_logits": True} if self.aux_loss_enabled else {}
            outputs = model(**model_inputs(inputs), use_cache=False, **router)
        logits, aux_loss = outputs.logits[..., shared], outputs.aux_loss if router else None

        rows, teacher_rows = logits[:, :-1][keep], teacher_logits[:, :-1][keep]
        reference_rows = None if reference_logits is None else reference_logits[:, :-1][keep]
        teacher_rows = compared_rows(self.objective, teacher_rows, reference_rows, tokens)
        if is_trl:
            loss = self.generalized_jsd_loss(
                logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], self.beta, num_items_in_batch=items
            )
        else:
            losses = objective.dense(rows, teacher_rows, tokens)
            loss = (self._weights(keep, items) * losses).sum()
        return loss, dense_stats(objective, rows, teacher_rows, tokens), aux_loss

    @property
    def has_token_stats(self) -> bool:
        return hasattr(self.teacher, "logits")  # not a cache, which has no more than a part of them

    def token_stats(self, inputs: Mapping[str, Any]) -> TokenStats:
        """Returns what the objective reports of every trained token, and how alike student and teacher are there."""
        if self._has_prompts_only or self.args.lmbda == 1:
            inputs = self._with_completions(inputs, self.model_wrapped)
        (_, keep, tokens), shared = self._tokens(inputs), slice(self.teacher.vocabulary)
        rows, teacher_rows, *reference_rows = (
            logits[:, :-1][keep][..., shared]
            for logits in (
                self.model_wrapped(**model_inputs(inputs), use_cache=False).logits,
                self.teacher.logits(inputs),
                *([] if self.reference is None else [self.reference.logits(inputs)]),
            )
        )
        teacher_rows = compared_rows(
            self.objective, teacher_rows, reference_rows[0] if reference_rows else None, tokens
        )
        return TokenStats(inputs["input_ids"], keep, sampled_stats(self.objective, rows, teacher_rows, tokens))

    def _log_tokens(
        self, inputs: Mapping[str, Any], labels: torch.Tensor, keep: torch.Tensor, stats: Mapping[str, torch.Tensor]
    ) -> None:
        mask = inputs.get("attention_mask")
        log_token_metrics(self, stats, torch.ones_like(labels) if mask is None else mask)
        if self.teacher.vocabulary is not None and self.teacher.vocabulary < width_of(self.model):
            is_label = inputs["labels"][:, 1:] != -100
            self._add_metric("outside_vocabulary_fraction", (is_label & ~keep).sum(), is_label.sum())


def _teacher(args: GKDConfig, teacher: Teacher | None, teacher_model: Any) -> Teacher:
    model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
    init_kwargs: Any = init_kwargs_of(args) if isinstance(model, str) else args.teacher_model_init_kwargs
    teacher = build_teacher(teacher, model, args.teacher_cache, init_kwargs)
    if isinstance(teacher, CachedTeacher):
        validate(args, cache_rules)
    elif args.seq_kd and not hasattr(teacher, "model"):
        raise ValueError(
            f"`seq_kd: true` lets the teacher write completions, which {type(teacher).__name__} cannot. Pass a "
            "`teacher_model`, or set `seq_kd: false`."
        )
    return teacher
