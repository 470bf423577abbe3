"""Configuration of [`DistillationTrainer`]: TRL's, with the objectives and G-OPD's fields."""

from dataclasses import dataclass, field
from typing import Any

import trl

from hf_rb.trainers.common.configs import ConfigMixin
from hf_rb.trainers.common.distillation_arguments import GopdArguments, ObjectiveArguments
from hf_rb.trainers.distillation.rules import distillation_rules, only_gkd
from hf_rb.utils.fields import described


__all__ = ["DistillationConfig"]


class _WithoutDataset:
    """Refuses keyword arguments of [`GKDConfig`] alone, and names the trainer that takes them. It is a base class, so
    that the signature of the config stays as it is.
    """

    def __new__(cls, *args: Any, **kwargs: Any):
        for problem in filter(None, map(only_gkd, kwargs)):
            raise TypeError(problem)
        return super().__new__(cls)


@dataclass
class DistillationConfig(_WithoutDataset, ConfigMixin, GopdArguments, ObjectiveArguments, trl.DistillationConfig):
    r"""
    Configuration class for the [`DistillationTrainer`].

    Everything in [`~trl.DistillationConfig`], and the fields below. With `objective="jsd"` the trainer is TRL's.

    Parameters:
        objective (`str`, *optional*, defaults to `"jsd"`):
            What the student minimises on its own completions: `"jsd"`, TRL's generalized Jensen-Shannon divergence
            with its `beta`; `"forward_kl"`, KL(teacher ‖ student); `"reverse_kl"`, KL(student ‖ teacher); `"akl"`,
            adaptive KL (https://huggingface.co/papers/2404.02657); `"gopd"`, generalized on-policy distillation
            (https://huggingface.co/papers/2602.12125). All but `"gopd"` use `temperature`, as TRL does.
        akl_mu (`float`, *optional*, defaults to `0.5`):
            Teacher mass of the head of adaptive KL, in `(0, 1]`.
        akl_head_rule (`str`, *optional*, defaults to `"paper"`):
            `"paper"`: the head is the smallest set of tokens that reaches `akl_mu`; `"code"`: without the token that
            crosses it, as in the authors' code.
        reward_scale (`float`, *optional*, defaults to `1.0`):
            Of `"gopd"`: weight of the reward log(teacher / reference), at least 0. 1 is on-policy distillation, above
            1 the student extrapolates past the teacher (ExOPD; the paper uses 1.25).
        reference_model_name_or_path (`str`, *optional*):
            Of `"gopd"`: the reference. By default the student at its start, which reads the student's prompts: with
            LoRA the model without its adapters, else a frozen copy. A reference that is given reads the teacher's
            prompts; the teacher's own base is the paper's reward correction.
        gopd_aggregation (`str`, *optional*, defaults to `"seq-mean-token-mean"`):
            How token losses are put together, exactly, over accumulation steps and processes: the mean over
            completions of each one's mean (the authors' recipe), the mean over all tokens (`"token-mean"`), or the
            mean over completions of each one's sum (`"seq-mean-token-sum"`, the paper's equation).
        gopd_tis_cap (`float`, *optional*):
            Multiplies every token's loss by min(q / sampler, cap), where q is the student in training and the sampler
            vLLM; the authors' scripts use 5. Needs `use_vllm=True`: generation by transformers samples from the
            student itself.
        gopd_logratio_clamp (`float`, *optional*):
            Bound of the absolute value of every log-ratio. Not in the paper.
        gopd_full_vocab (`bool`, *optional*, defaults to `False`):
            Whether to minimise, at every state, the reverse KL of which the sampled loss is an estimate, over the
            whole vocabulary: less variance, another LM-head product. Not in the paper.
        gopd_teacher_column (`str`, *optional*):
            Dataset column that names the teacher of each example, when `teacher_model_name_or_path` names several.
        teacher_model_name_or_path (`str` or `dict[str, str]`, *optional*):
            The teacher; with `gopd_teacher_column`, teachers by the names in that column, such as
            `{"math": "org/math-teacher", "code": "org/code-teacher"}`.

    Raises:
        ValueError: A value out of its range, or fields that exclude one another.
        TypeError: A field of [`GKDConfig`] alone; the message says what to do.
    """

    _rules = (distillation_rules,)
    _VALID_DICT_FIELDS = trl.DistillationConfig._VALID_DICT_FIELDS + ["teacher_model_name_or_path"]

    teacher_model_name_or_path: dict[str, str] | str | None = field(  # pyrefly: ignore[bad-override]
        default=None,
        metadata=described(
            "Model name or path of the teacher; with `gopd_teacher_column`, a mapping from the names in that column "
            "to models."
        ),
    )
