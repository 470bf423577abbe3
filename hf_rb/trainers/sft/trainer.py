"""Supervised fine-tuning: TRL's trainer, with ProFit's gate on the per-token log-probabilities."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import trl
from datasets import Dataset, IterableDataset
from torch.nn.functional import pad
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.utils import ModelOutput

from hf_rb.objectives import profit_mask
from hf_rb.ops.backbone import model_inputs, name_of
from hf_rb.ops.sequences import Sequences
from hf_rb.trainers.common.configs import own_config
from hf_rb.trainers.common.fused_head import check_fused_head, why_not_fused
from hf_rb.trainers.common.mixin import TrainerMixin
from hf_rb.trainers.common.packing import check_packing
from hf_rb.trainers.common.token_samples import TokenStats, certainty
from hf_rb.trainers.sft.config import SFTConfig


__all__ = ["SFTTrainer"]

logger = logging.getLogger(__name__)


class SFTTrainer(TrainerMixin, trl.SFTTrainer):
    """
    Trainer for supervised fine-tuning. Takes what [`~trl.SFTTrainer`] takes; without flags it is that trainer.

    `SFTConfig(profit_threshold=0.1)` trains with ProFit (https://huggingface.co/papers/2601.09195): labels that the
    model in training finds improbable stay in the context and leave the loss. It changes one thing, the
    log-probabilities that the parent sums: the forward pass, the denominator, the scaling over processes, the MoE
    auxiliary loss, the metrics and the evaluation loss, which is the negative log-likelihood of every label, stay the
    parent's.

    With ProFit these are logged too, over all labels since the last log (`eval_` before them in evaluation):

    - `profit/loss`, the gated loss, and `profit/nll`, the loss without the gate
    - `profit/kept_fraction`, the share of labels that pass the gate
    - `profit/kept_prob` and `profit/dropped_prob`, the mean probability of those that pass and of the others
    - `profit/eos_kept_rate`, the share of end-of-sequence labels that pass. A base model may give its end-of-turn
      token a probability below the threshold: the gate then hides it forever, and the model does not learn to stop.

    A model that lets the sequences of a packed row see each other is refused at the first packed batch, with or
    without flags, unless `allow_leaking_packing` is set.

    Raises:
        ValueError: In training, a model that leaks between packed sequences. With ProFit: a `compute_loss_func`, a
            prompt-learning adapter, context or sequence parallelism, a model that TRL trains without a token count
            when `profit_normalize="sequence"`, or, in training, one with logits that are not last hidden states times
            LM head.
    """

    args: SFTConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    _head_is_checked = False

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        **kwargs: Any,
    ):
        args = own_config(SFTConfig, args, model, "SFT")
        if args.profit_threshold is not None and compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` replaces the loss that `profit_threshold` gates. Pass one of the two."
            )
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func, **kwargs
        )
        if args.profit_threshold is not None:
            self._check_profit()

    def _check_profit(self) -> None:
        self._check_sequences("ProFit")
        if self.args.profit_normalize == "sequence" and not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"`profit_normalize: sequence` needs the size of the whole batch, which {type(self.model).__name__} "
                "makes the trainer leave out because its forward takes no keyword arguments. Use `profit_normalize: "
                "all`."
            )

    @property
    def _methods(self) -> list[str]:
        return [] if self.args.profit_threshold is None else ["profit"]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        # TRL hands the mask to the model beside the positions, if a collator made both.
        mask = inputs.get("attention_mask")
        check_packing(self, model, inputs, **({} if mask is None else {"attention_mask": mask}))
        if self.args.profit_threshold is None:
            is_fused = self.compute_loss_func is None and (self.label_smoother is None or self.args.loss_type != "nll")
            if is_fused:
                check_fused_head(self, model, "Pass a `compute_loss_func`: it gets the model's own logits.")
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_head(model)

        def gated_model(**kwargs: Any) -> ModelOutput:
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                gated = self._gate(outputs, inputs)
                if self.model.training:
                    outputs.log_probs = gated
            return outputs

        return super().compute_loss(gated_model, inputs, return_outputs, num_items_in_batch)

    def _check_head(self, model: torch.nn.Module) -> None:
        """Refuses a model with other logits than TRL's loss takes it to have, once a run: the gate would read wrong
        probabilities.
        """
        if self._head_is_checked:
            return
        reason, unwrapped = why_not_fused(self, model), cast(PreTrainedModel, self.accelerator.unwrap_model(model))
        if reason is not None:
            raise ValueError(
                "`profit_threshold` reads the probabilities that TRL's loss makes of last hidden states and LM head, "
                f"and the logits of {name_of(unwrapped)} are not that: {reason}. Train it without "
                "`profit_threshold`, or another model."
            )
        self._head_is_checked = True

    def _gate(self, outputs: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Returns the log-probabilities (B, L-1) that the parent's loss must sum in place of `outputs.log_probs`."""
        args, log_probs, is_label = self.args, outputs.log_probs, outputs.label_mask
        # A model split by `device_map` may end on another device than the one the batch is on.
        inputs = {key: value.to(log_probs.device) for key, value in inputs.items() if torch.is_tensor(value)}
        sequences = Sequences(inputs)
        kept = is_label & self._passes(log_probs, sequences)
        gated = torch.where(kept, log_probs, 0.0)

        # What the sum of `gated` is divided by. The parent divides by `num_items_in_batch`, the labels of the whole
        # batch.
        items = is_label.sum()
        if args.profit_normalize == "sequence":  # `_get_num_items_in_batch` counts sequences
            lengths = sequences.total(pad(is_label, (1, 0)).long())
            items = ((sequences.positions == 0) & (lengths > 0)).sum()
            gated = gated / lengths[:, 1:].clamp(min=1)
        if args.profit_normalize == "kept":
            items = kept.sum()
        self._log_gate(log_probs.detach(), inputs["labels"][:, 1:], is_label, kept, -gated.sum(), items)
        if args.profit_normalize == "kept":  # one process, one step: the parent divides by the labels of this batch
            gated = gated * (is_label.sum() / items.clamp(min=1))
        return gated

    def _passes(self, log_probs: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Returns which labels (B, L-1) pass the gate."""
        args: Any = self.args
        uniforms = None
        if args.profit_mode == "random":
            uniforms = sequences.uniforms(args.seed, self.state.global_step)[:, 1:]
        return profit_mask(
            log_probs,
            args.profit_threshold,
            args.profit_mode,
            args.profit_inclusive,
            args.profit_threshold_high,
            uniforms,
        )

    @property
    def has_token_stats(self) -> bool:
        return self.args.profit_threshold is not None

    def token_stats(self, inputs: Mapping[str, Any]) -> TokenStats:
        """Returns of every label its probability, the model's most probable token's, and whether it passes the
        gate.
        """
        logits, labels = self.model_wrapped(**model_inputs(inputs)).logits[:, :-1], inputs["labels"][:, 1:]
        is_label = labels != -100
        log_probs = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        kept = self._passes(log_probs, Sequences(inputs))
        values = {**certainty(logits[is_label], labels[is_label]), "kept": kept[is_label]}
        return TokenStats(inputs["input_ids"], is_label, values)

    def _log_gate(
        self,
        log_probs: torch.Tensor,
        labels: torch.Tensor,
        is_label: torch.Tensor,
        kept: torch.Tensor,
        loss: torch.Tensor,
        items: torch.Tensor,
    ) -> None:
        probs, dropped = log_probs.exp(), is_label & ~kept
        is_eos = is_label & torch.isin(labels, self._eos_token_ids(labels.device))
        self._add_metric("profit/loss", loss, items)
        self._add_metric("profit/nll", -log_probs.sum(), is_label.sum())
        self._add_metric("profit/kept_fraction", kept.sum(), is_label.sum())
        self._add_metric("profit/kept_prob", (probs * kept).sum(), kept.sum())
        self._add_metric("profit/dropped_prob", (probs * dropped).sum(), dropped.sum())
        self._add_metric("profit/eos_kept_rate", (kept & is_eos).sum(), is_eos.sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if logs.get("profit/kept_fraction") == 0:
            logger.warning(
                f"`profit_threshold: {self.args.profit_threshold}` has let no label pass since the last log, so the "
                "model has learnt nothing. Lower the threshold, or start from a model that knows the task."
            )

    def _eos_token_ids(self, device: torch.device) -> torch.Tensor:
        eos = self.model.generation_config.eos_token_id  # the trainer has added the tokenizer's
        return torch.tensor(eos if isinstance(eos, list) else [] if eos is None else [eos], device=device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if self.args.profit_threshold is None or self.args.profit_normalize != "sequence":
            return super()._get_num_items_in_batch(batch_samples, device)
        # One label for each sequence that has any, so that the parent, which adds up over accumulation steps and
        # processes, counts sequences.
        return super()._get_num_items_in_batch(
            [{**batch, "shift_labels": _one_label_each(batch)} for batch in batch_samples], device
        )


def _one_label_each(inputs: Mapping[str, Any]) -> torch.Tensor:
    is_label = inputs["labels"] != -100
    is_label[:, 0] = False  # nothing predicts the first token of a row
    sequences = Sequences(inputs)
    counted = (sequences.positions == 0) & (sequences.total(is_label.long()) > 0)
    return torch.where(counted, 0, -100)
