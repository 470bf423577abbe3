"""Distillation on dataset completions, the student's own, or a mixture: TRL's GKD with more objectives, teachers and data."""

import logging
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)

from hf_rb.ops import lm_head
from hf_rb.ops.backbone import model_inputs, own_randomness, width_of
from hf_rb.ops.generation import generation_config, own_distribution
from hf_rb.ops.logit_source import LogitSource
from hf_rb.ops.sequences import Sequences
from hf_rb.ops.wide_head import wide_heads
from hf_rb.teachers import CachedTeacher, Teacher, build_teacher
from hf_rb.trainers.common.distilling import (
    build_rule,
    check_finite,
    compared_rows,
    dense_losses,
    dense_stats,
    init_kwargs_of,
    last_hidden,
    log_token_metrics,
    sampled_stats,
)
from hf_rb.trainers.common.gopd import given_reference, make_reference, share_vocabulary, token_weights
from hf_rb.trainers.common.mixin import TrainerMixin, own_config
from hf_rb.trainers.common.packing import check_packing
from hf_rb.trainers.common.rules import cache_rules
from hf_rb.trainers.common.token_samples import TokenStats
from hf_rb.trainers.gkd.base import GKDBase
from hf_rb.trainers.gkd.config import GKDConfig
from hf_rb.trainers.gkd.data import last_turn_as_completion, prompts_of, require_completion, with_empty_completion
from hf_rb.utils import compat
from hf_rb.utils.fields import validate


__all__ = ["GKDTrainer"]

logger = logging.getLogger(__name__)


class GKDTrainer(TrainerMixin, GKDBase):
    """
    Trainer for distillation. Takes what TRL's `GKDTrainer` takes, and any data that [`SFTTrainer`] takes.

    It differs from TRL's trainer where that one is wrong or wasteful:

    - The loss is divided by the tokens that are trained on, over accumulation steps and processes: completions for a whole step are
      sampled before its tokens are counted, and the gradient does not depend on the number of processes.
    - No logits are kept; see `loss_impl`. With `loss_impl="dense"`, `lmbda=0` and one process, losses and gradients of
      `objective="jsd"` are TRL's, bit for bit.
    - Whether a step trains on the dataset, the student's or (with `seq_kd`) the teacher's completions is drawn once an optimizer step
      from the seed and the step, the same on all processes.
    - `messages` are labelled as TRL's collator does, the last turn; with `assistant_only_loss=True` every assistant turn.
      Prompt-completion and tokenized data, packing and padding-free batches work too; and with `lmbda=1` prompts alone.
    - Teacher and student may differ in the padding of their vocabulary. Labels outside the shared ids are left out.

    These are logged, over all tokens since the last log (`eval_` before them in evaluation, where `loss` is the objective on the
    evaluation data): `forward_kl`, `reverse_kl`, `entropy` of the student, `ce`, its cross-entropy on the labels, `kd`, the
    divergence before `kd_alpha` mixes it, `kept_fraction`, the share of tokens that are trained on, and what belongs to the
    objective, as `akl/weight`, `loca/corrected_fraction`, `hpd/suppressed_fraction` or `gopd/advantage`.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher, of any width. Defaults to `args.teacher_model_name_or_path`.
        teacher ([`~hf_rb.teachers.Teacher`], *optional*):
            Another source of the teacher's distributions, in its place.
        reference_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Reference of `objective="gopd"`. Defaults to `args.reference_model_name_or_path`, and that to the student at its start.

    Raises:
        ValueError: No teacher, or more than one; a teacher with other tokens; a reference that cannot act; a prompt-learning adapter,
            context or sequence parallelism, a `compute_loss_func`; images; data without anything to train on. In training: a loss that is not
            finite, or a model that lets packed sequences see each other.
    """

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
        self.teacher = _teacher(args, teacher, teacher_model)
        reference_model = given_reference(args, reference_model)
        self._has_prompts_only = False
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        self._check_supported()
        self.lmbda, self.beta, self.seq_kd, self.temperature = args.lmbda, args.beta, args.seq_kd, args.temperature
        self._rule = build_rule(args)
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
                "Teacher and student have different chat templates, and the teacher reads the tokens of the student's. Where that "
                "is not what it was trained on, set `chat_template_path` to the teacher, or use `DistillationTrainer`, which "
                "renders prompts for each."
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
        methods = [args.objective] if args.objective in ("akl", "hpd", "gopd") else []
        methods += ["loca"] if args.loca_alpha is not None else []
        return methods + (["llm_neo"] if args.objective == "forward_kl" and is_lora else [])

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        # SFT has the labels of prompts and completions right: the other layouts become one.
        example = next(iter(dataset))
        has_prompt, has_messages = "prompt" in example, "messages" in example or "conversations" in example
        if "input_ids" in example or formatting_func is not None:
            pass
        elif has_prompt and "completion" not in example and not has_messages:
            if args.lmbda < 1:
                raise ValueError(
                    f"The {dataset_name} dataset has prompts without completions, and `lmbda: {args.lmbda}` trains on the "
                    "completions of the dataset. Add a column `completion`, or set `lmbda: 1.0`."
                )
            self._has_prompts_only = True
            dataset = dataset.map(with_empty_completion)
        elif has_prompt and isinstance(example.get("completion"), list):
            dataset = dataset.map(require_completion)
        elif has_messages and not args.assistant_only_loss and args.completion_only_loss is not False:
            # `conversations` with `from` and `value` too.
            dataset = dataset.map(
                last_turn_as_completion,
                remove_columns=[name for name in ("messages", "conversations") if name in example],
            )
        if args.completion_only_loss is None:
            self.completion_only_loss = "completion" in next(iter(dataset))
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if next(iter(prepared), None) is None:
            raise ValueError(
                f"No example of the {dataset_name} dataset has a token to train on: every completion is empty or lies beyond "
                f"`max_length: {args.max_length}`. Raise `max_length`, or set `truncation_mode: keep_end`."
            )
        return prepared

    def _trained_labels(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Returns the labels (B, L) without those outside the vocabulary that teacher and student share."""
        labels, vocabulary = inputs["labels"], self.teacher.vocabulary
        return labels if vocabulary is None else labels.masked_fill(labels >= vocabulary, -100)

    def _get_num_items_in_batch(self, batch_samples, device):
        return super()._get_num_items_in_batch(
            [{**batch, "shift_labels": self._counted_labels(batch)} for batch in batch_samples], device
        )

    def _counted_labels(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Returns labels (B, L-1) as many as what the loss is divided by: trained tokens, or completions that have any."""
        labels = self._trained_labels(inputs)[:, 1:]
        if self.args.objective != "gopd" or self.args.gopd_aggregation == "token-mean":
            return labels
        is_label = labels != -100
        return labels.masked_fill(is_label.cumsum(-1) != 1, -100)

    # Sampling

    def get_batch_samples(self, epoch_iterator, num_batches, device):
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

    def _with_completions(self, inputs: Mapping[str, Any], writer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Replaces the completions of a batch; nothing of its old completions is left."""
        prompts = prompts_of(inputs)
        completions = self._sample(writer, prompts)
        rows = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
        labels = [
            torch.cat([torch.full_like(prompt, -100), completion])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    def _sample(self, writer: torch.nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Samples a completion of each prompt; it ends with its first end-of-sequence token."""
        ids = pad_sequence(prompts, batch_first=True, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
        with (
            own_randomness([self.accelerator.device]),
            compat.unwrap_model_for_generation(
                writer,
                self.accelerator,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            own_distribution(model),
        ):
            # From the step and the prompts, so that processes draw independently and a resumed run as the first one did.
            key = (self.args.seed, self.state.global_step, [prompt.tolist() for prompt in prompts])
            torch.manual_seed(random.Random(repr(key)).getrandbits(63))
            inputs = {"prompts": ids, "prompt_attention_mask": mask}
            sequences, is_token, _ = self.generate_on_policy_outputs(model, inputs, self.generation_config)
        start = ids.shape[1]
        return [row[start:][kept[start:] == 1] for row, kept in zip(sequences, is_token, strict=True)]

    # Loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # G-OPD is about sampled tokens, and prompts alone have no others.
        if self.args.objective == "gopd" or self._has_prompts_only:
            inputs = self._with_completions(self._prepare_inputs(inputs), model)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        check_packing(self, model, inputs)
        labels = self._trained_labels(inputs)
        keep = labels[:, 1:] != -100
        tokens = {"labels": labels[:, 1:][keep]}
        if self.args.objective == "hpd":
            draws = Sequences(inputs).uniforms(self.args.seed, self.state.global_step)
            tokens["uniforms"] = draws[:, 1:][keep]
        items = num_items_in_batch
        if items is None:
            items = (self._counted_labels(inputs) != -100).sum()
        items = torch.as_tensor(items).clamp(min=1)  # without anything to train on, a finite zero

        if self.args.loss_impl == "dense":
            loss, stats, aux_loss = self._dense_loss(model, inputs, labels, keep, tokens, items)
        else:
            student = self.accelerator.unwrap_model(model)
            # Inside the forward of the wrapper, where DDP's hooks fire and FSDP and DeepSpeed have the weights in place.
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
        how = self.args.gopd_aggregation if self.args.objective == "gopd" else "token-mean"
        return token_weights(keep, how, tokens=items, sequences=items)[keep]

    def _chunked_loss(self, student, inputs, keep, tokens, items):
        with self.accelerator.autocast():
            teacher = self._score(inputs, keep, tokens)
            hidden, aux_loss = last_hidden(self._student_logits, student, inputs, self.aux_loss_enabled)
            with self._student_logits.head(student) as head:
                scored = lm_head.lm_head_loss(
                    hidden[:, :-1][keep],
                    head,
                    self._rule,
                    tokens,
                    teacher,
                    self._weights(keep, items),
                    vocabulary=self.teacher.vocabulary,
                )
        return scored.loss, scored.stats, aux_loss

    def _score(self, inputs, keep, tokens):
        """Returns what the loop takes as teacher, and adds to `tokens` what the rule needs of it."""
        scale, labels = self.args.reward_scale, tokens["labels"]
        if self.args.objective == "gopd" and not self.args.gopd_full_vocab:
            tokens["teacher_logp"] = self.teacher.log_probs(inputs, keep, labels)
            if self.reference is not None:
                tokens["reference_logp"] = self.reference.log_probs(inputs, keep, labels)
            return None
        teacher = self.teacher.score(inputs, keep)
        if isinstance(teacher, lm_head.CachedTeacher):
            tokens["label_event"] = (teacher.ids == labels.unsqueeze(-1)).int().argmax(-1)
        if self.reference is None:
            return teacher
        # Reverse KL to the mixture whose logits are these: at every state, what G-OPD's sampled loss estimates.
        parts = [replace(part, factor=scale * part.factor) for part in teacher]
        return parts + [replace(part, factor=(1 - scale) * part.factor) for part in self.reference.score(inputs, keep)]

    def _dense_loss(self, model, inputs, labels, keep, tokens, items):
        args, shared = self.args, slice(self.teacher.vocabulary)
        is_trl = args.objective == "jsd" and args.kd_alpha == 1 and args.loca_alpha is None  # its logits too are TRL's
        sources = [source for source in (self.teacher, self.reference) if hasattr(source, "model")]
        models = [self.accelerator.unwrap_model(model), *(source.model for source in sources)]
        with wide_heads(*([] if is_trl else models)):
            teacher_logits = self.teacher.logits(inputs)[..., shared]
            if self.reference is not None:
                reference_logits = self.reference.logits(inputs)[..., shared]
            router = {"output_router_logits": True} if self.aux_loss_enabled else {}
            outputs = model(**model_inputs(inputs), use_cache=False, **router)
        logits, aux_loss = outputs.logits[..., shared], outputs.aux_loss if router else None

        rows, teacher_rows = logits[:, :-1][keep], teacher_logits[:, :-1][keep]
        reference_rows = None if self.reference is None else reference_logits[:, :-1][keep]
        teacher_rows = compared_rows(self.args, teacher_rows, reference_rows, tokens)
        if is_trl:
            loss = self.generalized_jsd_loss(
                logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], self.beta, num_items_in_batch=items
            )
        else:
            losses = dense_losses(self._rule, rows, teacher_rows, tokens)
            loss = (self._weights(keep, items) * losses).sum()
        return loss, dense_stats(self._rule, rows, teacher_rows, tokens), aux_loss

    @property
    def has_token_stats(self) -> bool:
        return hasattr(self.teacher, "logits")  # not a cache, which has no more than a part of them

    def token_stats(self, inputs: Mapping[str, Any]) -> TokenStats:
        """Returns of every token that is trained on what the objective reports of it, and how alike student and teacher are there."""
        if self._has_prompts_only or self.args.lmbda == 1:
            inputs = self._with_completions(inputs, self.model_wrapped)
        labels = self._trained_labels(inputs)
        keep, shared = labels[:, 1:] != -100, slice(self.teacher.vocabulary)
        tokens = {"labels": labels[:, 1:][keep]}
        if self.args.objective == "hpd":
            tokens["uniforms"] = Sequences(inputs).uniforms(self.args.seed, self.state.global_step)[:, 1:][keep]
        rows, teacher_rows, *reference_rows = (
            logits[:, :-1][keep][..., shared]
            for logits in (
                self.model_wrapped(**model_inputs(inputs), use_cache=False).logits,
                self.teacher.logits(inputs),
                *([] if self.reference is None else [self.reference.logits(inputs)]),
            )
        )
        teacher_rows = compared_rows(self.args, teacher_rows, reference_rows[0] if reference_rows else None, tokens)
        return TokenStats(inputs["input_ids"], keep, sampled_stats(self._rule, rows, teacher_rows, tokens))

    def _log_tokens(self, inputs, labels, keep, stats) -> None:
        mask = inputs.get("attention_mask")
        log_token_metrics(self, stats, torch.ones_like(labels) if mask is None else mask)
        if self.teacher.vocabulary is not None and self.teacher.vocabulary < width_of(self.model):
            is_label = inputs["labels"][:, 1:] != -100
            self._add_metric("outside_vocabulary_fraction", (is_label & ~keep).sum(), is_label.sum())


def _teacher(args: GKDConfig, teacher: Teacher | None, teacher_model: Any) -> Teacher:
    model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
    init_kwargs = init_kwargs_of(args) if isinstance(model, str) else args.teacher_model_init_kwargs
    teacher = build_teacher(teacher, model, args.teacher_cache, init_kwargs)
    if isinstance(teacher, CachedTeacher):
        validate(args, cache_rules)
    elif args.seq_kd and not hasattr(teacher, "model"):
        raise ValueError(
            f"`seq_kd: true` lets the teacher write completions, which {type(teacher).__name__} cannot. Pass a `teacher_model`, or "
            "set `seq_kd: false`."
        )
    return teacher
