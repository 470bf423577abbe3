"""Parts of G-OPD beside its rule: the mean over tokens, the reference, one of several teachers for each example."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, Trainer

from hf_rb.objectives.objective import Objective
from hf_rb.ops.backbone import width_of, without_peft
from hf_rb.teachers import AdapterOffTeacher, LocalTeacher, ModelTeacher
from hf_rb.trainers.common.distilling import init_kwargs_of


__all__ = [
    "RoutedTeacher",
    "copy_of",
    "given_reference",
    "make_reference",
    "share_vocabulary",
    "start_reference",
    "token_weights",
]


def token_weights(
    mask: torch.Tensor,
    aggregation: str,
    tokens: torch.Tensor | float | None = None,
    sequences: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """
    Factors that turn a sum over tokens into the configured mean over the whole batch.

    Args:
        mask (`torch.Tensor` of shape `(B, C)`):
            Whether a token is trained on, one completion a row.
        aggregation (`str`):
            `"seq-mean-token-mean"`: the mean over completions of each one's mean; `"token-mean"`; or
            `"seq-mean-token-sum"`: the mean over completions of each one's sum.
        tokens, sequences (`torch.Tensor` or `float`, *optional*):
            Trained tokens, and completions with any, in the whole batch (accumulation steps and processes) divided by
            the number of processes. By default those of `mask`.

    Returns:
        `torch.Tensor` of shape `(B, C)`: Weights in float32, 0 outside the mask.
    """
    lengths = mask.sum(1, keepdim=True)
    if aggregation == "token-mean":
        total = lengths.sum() if tokens is None else tokens
    else:
        total = (lengths > 0).sum() if sequences is None else sequences
    weights = mask / torch.as_tensor(total, dtype=torch.float32, device=mask.device).clamp(min=torch.finfo().tiny)
    return weights / lengths.clamp(min=1) if aggregation == "seq-mean-token-mean" else weights


def given_reference(
    args: Any, objective: Objective, model: str | PreTrainedModel | None
) -> str | PreTrainedModel | None:
    """
    Returns the reference that a trainer was given, by argument or in its config, if any.

    Raises:
        ValueError: It cannot act, or there are two.
    """
    if model is None:
        return args.reference_model_name_or_path
    if not objective.needs_reference:
        raise ValueError(
            "`reference_model` acts with `objective: gopd` and a `reward_scale` other than 1, where it does not "
            f"cancel; got `objective: {args.objective}` and `reward_scale: {args.reward_scale}`. Set them, or pass "
            "no reference."
        )
    if args.reference_model_name_or_path is not None:
        raise ValueError("`reference_model` and `reference_model_name_or_path` are two references. Give one.")
    return model


def make_reference(trainer: Any, model: str | PreTrainedModel | None, **init_kwargs: Any) -> ModelTeacher | None:
    """Returns the reference of a trainer, not prepared yet; `None` where nothing reads one. The kwargs are for a
    model's name.
    """
    args = trainer.args
    if not trainer.objective.needs_reference:
        return None
    if model is None:
        return start_reference(trainer)
    return LocalTeacher(model, init_kwargs | init_kwargs_of(args) if isinstance(model, str) else None)


def start_reference(trainer: Any) -> ModelTeacher:
    """
    Returns a trainer's student as it is now, as a frozen model: itself without its adapters, or a copy of it.

    Raises:
        ValueError: The adapters already do something, so that without them it is another model; or its weights are
            spread over processes, where they cannot be copied.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model):
        if not _adapters_are_neutral(model):
            raise ValueError(
                "The reference of G-OPD is the student at its start, and with LoRA that is the model without its "
                "adapters: but the adapters given here already change the model. Merge them into it first "
                "(`merge_and_unload()`), start from new ones with LoRA's default initialisation, or set "
                "`reference_model_name_or_path`."
            )
        return AdapterOffTeacher()
    if any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "The reference of G-OPD is a copy of the student at its start, and this process does not have all of the "
            "student (DeepSpeed ZeRO-3, or FSDP with `fsdp_cpu_ram_efficient_loading`). Use LoRA, whose reference is "
            "the model without its adapters, or set `reference_model_name_or_path` to the model that the student "
            "starts from."
        )
    return LocalTeacher(copy_of(model), tokenizer=trainer.processing_class)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of a trainer's model. Without the `forward` that TRL patches for its own loss, and which runs the
    first model.
    """
    copied = copy.deepcopy(model)
    for one in (copied, without_peft(copied)):
        one.__dict__.pop("forward", None)
    return copied


def _adapters_are_neutral(model: PreTrainedModel) -> bool:
    """Whether every adapter is a LoRA whose second factor is still zero."""
    if any(config.peft_type != "LORA" for config in model.peft_config.values()):
        return False
    return not any(
        parameter.any()
        for name, parameter in model.named_parameters()
        if "lora_B" in name or "lora_embedding_B" in name
    )


def share_vocabulary(trainer: Any) -> int | None:
    """
    Cuts a trainer's prepared teacher and reference to the leading ids that all its models have, over which each one's
    probabilities then sum to 1: what is compared must be normalised alike. No other id is generated, since not every
    model could read it. Returns the number of ids, `None` for all that the student has.
    """
    sources = [source for source in (trainer.teacher, trainer.reference) if source is not None]
    number = min((one.vocabulary for one in sources if one.vocabulary is not None), default=None)
    for one in sources:
        one.vocabulary = number
    writers = [trainer.model, getattr(trainer.teacher, "model", None)]  # the teacher with `seq_kd`
    width = max(width_of(model) for model in writers if model is not None)
    if number is not None and number < width:
        config = trainer.generation_config
        config.suppress_tokens = [*(config.suppress_tokens or []), *range(number, width)]
    return number


class RoutedTeacher:
    """
    Several teachers, each scoring the examples that name it. A [`~hf_rb.teachers.Teacher`] for log-probabilities of
    tokens; a batch says in `inputs["route"]`, of shape (B,), which teacher a row is for, as an index into `names`.

    Args:
        teachers (`dict[str, Teacher]`):
            Teachers by the name that the dataset gives them.
    """

    def __init__(self, teachers: Mapping[str, ModelTeacher]):
        self.teachers = dict(teachers)
        self.names = list(teachers)

    def prepare(self, trainer: Trainer) -> None:
        for teacher in self.teachers.values():
            teacher.prepare(trainer)
            if isinstance(teacher, LocalTeacher):
                # of which all processes have to agree, and later not each of them runs every teacher
                teacher.is_head()
        # Where processes hold parts of a teacher, all of them must take part in each of its forward passes.
        self._in_step = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled

    @property
    def vocabulary(self) -> int | None:
        sizes = [teacher.vocabulary for teacher in self.teachers.values() if teacher.vocabulary is not None]
        return min(sizes, default=None)

    @vocabulary.setter
    def vocabulary(self, number: int | None) -> None:
        for teacher in self.teachers.values():
            teacher.vocabulary = number

    def log_probs(self, inputs: Mapping[str, Any], keep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
        route = inputs["route"]
        for index, teacher in enumerate(self.teachers.values()):
            rows = route == index
            is_absent = not rows.any()
            if is_absent and not self._in_step:
                continue
            chosen = (
                torch.zeros_like(rows).index_fill(0, rows.new_zeros(1, dtype=torch.long), True) if is_absent else rows
            )
            of_rows = chosen.unsqueeze(1).expand_as(keep)[keep]
            part = {key: value[chosen] for key, value in inputs.items()}
            scores = teacher.log_probs(part, keep[chosen], ids[of_rows])
            if not is_absent:
                result[of_rows] = scores
        return result
