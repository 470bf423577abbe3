"""Support of mixtures of experts in a trainer: the auxiliary loss that their configuration names, and MPI's steps
after the optimizer's.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_rb.models.mpi.callbacks import MPICallback, RouterDoctorCallback
from hf_rb.models.mpi.conversion import routers
from hf_rb.models.mpi.losses import auxiliary_loss, check_z_loss
from hf_rb.trainers.common.below import TrainerBelow


__all__ = ["add_router_doctor", "auxiliary_loss_of", "has_mpi", "prepare_routers"]

logger = logging.get_logger(__name__)


def prepare_routers(trainer: TrainerBelow) -> None:
    """Makes a trainer that has its model follow what the model's routers need. Does nothing for other models."""
    model: Any = trainer.model
    model = model.get_base_model() if is_peft_model(model) else model
    maps = [layer.mpi for layer in routers(model) if layer.mpi is not None]
    if any(mpi.mode == "inplace" or mpi.ramp_steps for mpi in maps):
        if not any(isinstance(callback, MPICallback) for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(MPICallback())
    config = model.config.get_text_config()
    if getattr(config, "lb_type", "hf") != "hf" or getattr(config, "z_loss_coef", 0):
        _check_auxiliary_loss(model, config)
        if hasattr(trainer, "aux_loss_enabled"):
            _use_own_auxiliary_loss(model)
        else:
            logger.warning(
                f"{type(trainer).__name__} has no auxiliary loss, as its TRL parent: nothing balances the experts of "
                "this mixture. Watch their load (`router_doctor: mean`), or use a trainer that has one (SFT, GKD, "
                "GRPO)."
            )


def _check_auxiliary_loss(model: PreTrainedModel, config: Any) -> None:
    if not hasattr(config, "router_aux_loss_coef"):
        raise ValueError(
            f"{type(model).__name__} has no auxiliary loss, so `lb_type` and `z_loss_coef` of its configuration "
            "cannot act: remove them. Routers with a bias, as DeepSeek-V3's, are balanced by "
            "`hf_rb.models.mpi.callbacks.LossFreeBalanceCallback`."
        )
    check_z_loss(config)


def auxiliary_loss_of(model: PreTrainedModel, output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Returns the auxiliary loss of a mixture of experts for a batch and the output of its forward pass."""
    positions = inputs.get("position_ids")
    mask = None if positions is not None else inputs.get("attention_mask")
    config = model.config.get_text_config()
    return auxiliary_loss(config, output.router_logits, inputs["input_ids"].shape, mask, positions)


def add_router_doctor(trainer: TrainerBelow, per_layer: bool = False) -> None:
    """
    Lets a trainer log what the doctor sees, before its reporters are called.

    Raises:
        ValueError: The model has no routers.
    """
    if not any(True for _ in routers(trainer.model)):
        raise ValueError(
            f"`router_doctor` looks at the routers of a mixture of experts, and {type(trainer.model).__name__} has "
            "none. Remove it."
        )
    trainer.callback_handler.callbacks.insert(0, RouterDoctorCallback(per_layer=per_layer))


def has_mpi(model: nn.Module | None) -> bool:
    """Returns whether a model, if there is one already, has MPI routers."""
    return model is not None and any(layer.mpi is not None for layer in routers(model))


def _use_own_auxiliary_loss(model: PreTrainedModel) -> None:
    """
    Replaces `aux_loss` in what the forward pass returns, and its part of `loss`.

    A class's own forward pass is not enough: TRL's trainers put one in its place that scores tokens without the
    logits, and computes transformers' auxiliary loss itself.
    """
    forward = model.forward

    @functools.wraps(type(model).forward)
    def with_own_loss(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        seen = []
        handle = self.base_model.register_forward_hook(lambda module, args, output: seen.append(output.router_logits))
        try:
            outputs = forward(*args, **kwargs)
        finally:
            handle.remove()
        if outputs.get("aux_loss") is None:
            return outputs
        config = self.config.get_text_config()
        shape = kwargs["input_ids"].shape if "input_ids" in kwargs else args[0].shape
        own = auxiliary_loss(config, seen.pop(), shape, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        if outputs.get("loss") is not None:
            outputs["loss"] = outputs["loss"] + config.router_aux_loss_coef * (own - outputs["aux_loss"])
        outputs["aux_loss"] = own
        return outputs

    model.forward = types.MethodType(with_own_loss, model)
