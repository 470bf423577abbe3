"""
Callbacks for trainers of mixtures of experts: what an MPI router does after an optimizer step, balance by a bias, and
the doctor's log.

They work with every `transformers.Trainer`. Our own trainers add [`MPICallback`] by themselves where a model needs it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_rb.models.mpi.conversion import RoutedLayer, advance
from hf_rb.models.router_report import (
    Load,
    RouterMeter,
    evenness,
    layer_alignments,
    max_vio,
    mean_entropy,
    total_picks,
)


__all__ = ["LossFreeBalanceCallback", "MPICallback", "RouterDoctorCallback"]


class MPICallback(TrainerCallback):
    """
    Iterates routers in place after each optimizer step (`mpi_mode="inplace"`), and moves ramps on (`ramp_steps`).
    Without it the first would be ordinary routers, and the second would stay at their start. Others are left alone.

    In place, a router jumps with every step while the moments of the optimizer stay, so they are of the gradients
    along a path that the router did not take. This mode is an experiment: the paper's code maps the router in each
    forward pass, the default.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        advance(kwargs["model"])


class _Metered(TrainerCallback):
    """Has a meter on the training passes of the model while it trains."""

    meter: RouterMeter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.meter = RouterMeter(kwargs["model"], training=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.meter.close()


class LossFreeBalanceCallback(_Metered):
    """
    Balances experts without a loss (https://huggingface.co/papers/2408.15664): after each optimizer step

        bias_i += rate · sign(mean load - load_i)

    with the load of all micro-batches and processes of the step. The bias is added to an expert's score when experts
    are chosen, and to nothing else. It is for models that have one, `e_score_correction_bias` in DeepSeek-V3,
    GLM-4-MoE and their like, whose training in transformers leaves it at zero; with MPI or without.

    Args:
        rate (`float`, *optional*, defaults to `1e-3`):
            What a step changes.

    Raises:
        ValueError: `rate` is not positive, or, when training begins, the routers have no such bias.
    """

    def __init__(self, rate: float = 1e-3):
        if not rate > 0:
            raise ValueError(f"rate={rate} must be positive; the paper has 0.001.")
        self.rate = rate
        self._biases: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._biases = [_expert_bias(kwargs["model"], layer) for layer in self.meter.layers]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for bias, load in zip(self._biases, self.meter.take(), strict=True):
            bias.view(-1).add_(self.rate * torch.sign(load.picks.mean() - load.picks).to(bias))


def _expert_bias(model: nn.Module, layer: RoutedLayer) -> Tensor:
    for module in (layer.router, model.get_submodule(layer.name)):
        if isinstance(bias := getattr(module, "e_score_correction_bias", None), Tensor):
            return bias
    raise ValueError(
        f"The router {layer.name} ({type(layer.router).__name__}) has no `e_score_correction_bias` that would "
        "balance its experts: use a balance loss (`router_aux_loss_coef`, and `lb_type` of the MPI classes) instead "
        "of LossFreeBalanceCallback."
    )


class RouterDoctorCallback(_Metered):
    """
    Adds to what a trainer logs, with a mean over the layers, what the doctor sees in the training passes since the
    last log: `router/max_vio` (of an optimizer step's tokens), `router/global_max_vio` (of all tokens), `router/dead`,
    `router/load_entropy`, `router/entropy`, `router/lambda_learned`, `router/lambda_effective` and
    `router/lambda_random` (one power step on random rows).

    Reporters that a trainer has made from `report_to` are called before the callbacks it is given. For their sake
    write `trainer.callback_handler.callbacks.insert(0, RouterDoctorCallback())`; given as `callbacks=[...]` it reaches
    the console and `trainer_state.json`.

    Args:
        per_layer (`bool`, *optional*, defaults to `False`):
            Whether to log every layer by itself too, as `router/<layer>/max_vio` and so on.
        alignments (`bool`, *optional*, defaults to `True`):
            Whether to log λ, for which every log computes the norm of every expert's matrix.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random rows.
    """

    def __init__(self, per_layer: bool = False, alignments: bool = True, seed: int = 0):
        self.per_layer, self.alignments, self.seed = per_layer, alignments, seed
        self._steps: list[list[Load]] = []

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps.append(self.meter.take())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if not self._steps or "loss" not in logs:  # evaluation, or the summary at the end
            return
        layers = {layer.name: self._measure(index, layer) for index, layer in enumerate(self.meter.layers)}
        self._steps.clear()
        first, *_ = layers.values()
        found = {f"router/{key}": sum(one[key] for one in layers.values()) / len(layers) for key in first}
        if self.per_layer:
            found |= {f"router/{name}/{key}": value for name, one in layers.items() for key, value in one.items()}
        logs.update(found)
        state.log_history[-1].update(found)

    def _measure(self, index: int, layer: RoutedLayer) -> dict[str, float]:
        loads = [step[index] for step in self._steps]
        picks = total_picks(loads)
        values = {
            "max_vio": sum(max_vio(load.picks) for load in loads) / len(loads),
            "global_max_vio": max_vio(picks),
            "dead": float((picks == 0).sum()),
            "load_entropy": evenness(picks),
            "entropy": mean_entropy(loads),
        }
        if self.alignments:
            values |= {f"lambda_{key}": value for key, value in layer_alignments(layer, self.seed + index).items()}
        return values
