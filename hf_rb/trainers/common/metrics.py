"""Metrics that do not depend on how a batch is split, and those that a token rule reports."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from hf_rb.methods.metrics import TOKEN_METRICS
from hf_rb.methods.registry import methods
from hf_rb.trainers.common.below import TrainerBelow


__all__ = ["MetricsMixin", "check_finite", "log_token_metrics"]


class MetricsMixin(TrainerBelow):
    """
    `_add_metric` averages over tokens, accumulation steps and processes, `_add_extremes` finds the smallest and the
    largest value, each with one reduction when the trainer logs.
    """

    @cached_property
    def _metric_sums(self) -> dict[str, dict[str, Any]]:
        """Of each metric, the sums of its numerator and denominator since the last log, on this process."""
        return {"train": defaultdict(float), "eval": defaultdict(float)}

    @cached_property
    def _metric_extremes(self) -> dict[str, dict[str, torch.Tensor]]:
        """Of each metric, its largest negative and its largest value since the last log, on this process."""
        return {"train": {}, "eval": {}}

    def _add_metric(self, name: str, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
        """
        Adds to a metric that is logged as the ratio of two sums, over everything since the last log and all processes.

        Args:
            name (`str`):
                Name in the logs, where evaluation puts `eval_` before it. A metric whose denominator is zero is left
                out.
            numerator, denominator (`torch.Tensor`):
                Scalars of this process. All processes must add the same metrics in the same order.
        """
        sums = self._metric_sums["train" if self.model.training else "eval"]
        sums[name] = sums[name] + torch.stack([numerator.detach().float(), denominator.float()])

    def _add_extremes(self, name: str, values: torch.Tensor) -> None:
        """
        Adds to a metric that is logged as `<name>_min` and `<name>_max` over everything since the last log and all
        processes.

        Args:
            name (`str`):
                Name in the logs.
            values (`torch.Tensor` of shape `(N,)`):
                Values of this process. All processes must add the same metrics in the same order; N may be 0.
        """
        extremes = self._metric_extremes["train" if self.model.training else "eval"]
        values = values.detach().float()
        both = torch.stack([-values, values], dim=-1)
        before = extremes.get(name, both.new_full((2,), -torch.inf))
        extremes[name] = torch.cat([both, before.unsqueeze(0)]).amax(0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        sums, extremes = self._metric_sums[mode], self._metric_extremes[mode]
        prefix = "" if mode == "train" else "eval_"
        if sums:
            totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
            logs.update(
                {prefix + name: total / count for name, (total, count) in zip(sums, totals, strict=True) if count}
            )
            sums.clear()
        if extremes:
            largest = self.accelerator.gather(torch.stack(list(extremes.values())).unsqueeze(0)).amax(0).tolist()
            for name, (negative, value) in zip(extremes, largest, strict=True):
                if value > -torch.inf:
                    logs.update({f"{prefix}{name}_min": -negative, f"{prefix}{name}_max": value})
            extremes.clear()
        super().log(logs, start_time)


def check_finite(objective: str, step: int, loss: torch.Tensor, losses: torch.Tensor | None = None) -> None:
    """
    Raises before a loss that is not finite can reach the weights.

    Raises:
        ValueError: `loss`, of which `losses` are the tokens' where they are known, is infinite or not a number.
    """
    if torch.isfinite(loss):
        return
    where = "" if losses is None else f" ({int((~torch.isfinite(losses)).sum())} of {len(losses)} tokens)"
    raise ValueError(
        f"`objective: {objective}` gave a loss of {loss.item()} at step {step}{where}; the weights have not been "
        "changed. Either the teacher excludes tokens (logits of -inf) or overflows: `forward_kl` and `hpd` can take "
        "the first, and `teacher_model_init_kwargs: {dtype: bfloat16}` avoids the second. Or the student has "
        "diverged: lower `learning_rate`."
    )


def log_token_metrics(trainer: Any, stats: Mapping[str, torch.Tensor], is_token: torch.Tensor) -> None:
    """
    Adds to a trainer's metrics the means of what a rule reports of every token (N,), fractions and extremes.

    Args:
        trainer ([`~transformers.Trainer`]):
            A distillation trainer.
        stats (`Mapping[str, torch.Tensor]`):
            What the rule reports.
        is_token (`torch.Tensor` of shape `(B, L)`):
            Mask of all tokens of the batch, prompts and what is not trained on among them.
    """
    count = torch.tensor(len(stats["loss"]), device=stats["loss"].device)
    trainer._add_metric("kept_fraction", count, is_token.sum().to(count.device))
    for metric in (*TOKEN_METRICS, *trainer.objective.method.metrics, *methods("trainer")["loca"].method.metrics):
        stat = metric.stat or metric.name
        if stat in stats:
            trainer._add_metric(metric.name, stats[stat].sum(), count)
            if metric.extremes:
                trainer._add_extremes(metric.name, stats[stat])
