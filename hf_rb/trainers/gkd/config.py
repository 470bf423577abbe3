"""Configuration of [`GKDTrainer`]: TRL's, with the objectives, their mixtures and the cached teacher."""

from dataclasses import dataclass, field

from hf_rb.trainers.common.configs import ConfigMixin
from hf_rb.trainers.common.distillation_arguments import GopdArguments, ObjectiveArguments, PackingArguments
from hf_rb.trainers.common.rules import packing_rules
from hf_rb.trainers.gkd.base_config import GKDBaseConfig
from hf_rb.trainers.gkd.rules import gkd_rules
from hf_rb.utils.fields import described


__all__ = ["GKDConfig"]


@dataclass
class GKDConfig(ConfigMixin, GopdArguments, ObjectiveArguments, PackingArguments, GKDBaseConfig):
    r"""
    Configuration class for the [`GKDTrainer`].

    Everything in TRL's `GKDConfig`, and the fields below. `temperature` is that of sampling; losses are at temperature
    1.

    Parameters:
        objective (`str`, *optional*, defaults to `"jsd"`):
            What the student minimises: `"jsd"`, TRL's generalized Jensen-Shannon divergence with its `beta`;
            `"forward_kl"`, KL(teacher ‖ student); `"reverse_kl"`, KL(student ‖ teacher); `"akl"`, adaptive KL
            (https://huggingface.co/papers/2404.02657); `"hpd"`, hybrid policy distillation
            (https://huggingface.co/papers/2604.20244), with `lmbda=0`; `"gopd"`, generalized on-policy distillation
            (https://huggingface.co/papers/2602.12125), with `lmbda=1` and `temperature=1`.
        loss_impl (`str`, *optional*, defaults to `"chunked"`):
            `"chunked"` goes through the LM heads tile by tile and keeps no logits; `"dense"` is the formula on all
            logits, the reference that the other is tested against. Both give the same losses and gradients, up to
            rounding: in both, half precision ends before the logits. The exception is `"dense"` with `objective="jsd"`
            alone, which is TRL's computation with TRL's rounding. The first step compares each model's own logits with
            its hidden states through its LM head; where they differ, its own logits are used, with a warning.
        kd_alpha (`float`, *optional*, defaults to `1.0`):
            The loss is `(1 - kd_alpha) · cross-entropy + kd_alpha · divergence`. Below 1 it needs `lmbda=0`. LLM-Neo
            (https://huggingface.co/papers/2411.06839) is `objective="forward_kl"` with this and LoRA.
        loca_alpha (`float`, *optional*):
            Switches LoCa (https://huggingface.co/papers/2409.04778) on: where the teacher prefers another token to the
            label, its distribution is calibrated so that the label wins by `1 - loca_alpha`. In `(0, 1]`; needs
            `lmbda=0`.
        akl_mu (`float`, *optional*, defaults to `0.5`):
            Teacher mass of the head of adaptive KL, in `(0, 1]`.
        akl_head_rule (`str`, *optional*, defaults to `"paper"`):
            `"paper"`: the head is the smallest set of tokens that reaches `akl_mu`; `"code"`: without the token that
            crosses it, as in the authors' code.
        hpd_sample (`bool`, *optional*, defaults to `True`):
            Whether HPD draws a token from the student at every position; `False` is the paper's ablation.
        hpd_reinforce (`bool`, *optional*, defaults to `True`):
            Whether HPD sends the mass taken from the drawn token to the label; `False` is the paper's ablation.
        teacher_cache (`str`, *optional*):
            Folder written by `hf-rb cache-teacher`, from which the teacher's distributions are read; no teacher is
            loaded. For `"forward_kl"` and `"akl"` with `lmbda=0`.
        reward_scale (`float`, *optional*, defaults to `1.0`):
            Of `"gopd"`: weight of the reward log(teacher / reference), at least 0. 1 is on-policy distillation, above
            1 the student extrapolates past the teacher (ExOPD; the paper uses 1.25).
        reference_model_name_or_path (`str`, *optional*):
            Of `"gopd"`: the reference. By default the student at its start: with LoRA the model without its adapters,
            else a frozen copy.
        gopd_aggregation (`str`, *optional*, defaults to `"seq-mean-token-mean"`):
            How token losses are put together, exactly, over accumulation steps and processes: the mean over
            completions of each one's mean (the authors' recipe), the mean over all tokens (`"token-mean"`), or the
            mean over completions of each one's sum (`"seq-mean-token-sum"`, the paper's equation).
        gopd_tis_cap (`float`, *optional*), gopd_teacher_column (`str`, *optional*):
            Of [`DistillationConfig`]; refused here.
        gopd_logratio_clamp (`float`, *optional*):
            Bound of the absolute value of every log-ratio. Not in the paper.
        gopd_full_vocab (`bool`, *optional*, defaults to `False`):
            Whether to minimise, at every state, the reverse KL of which the sampled loss is an estimate, over the
            whole vocabulary. Not in the paper.
        allow_leaking_packing (`bool`, *optional*, defaults to `False`):
            Whether to train a model that lets the sequences of a packed row see each other, as TRL does. By default
            such a model is refused at the first packed batch, which is compared with one of its sequences alone.

    Raises:
        ValueError: A value out of its range, or fields that exclude one another.
    """

    _rules = (gkd_rules, packing_rules)

    loss_impl: str = field(
        default="chunked",
        metadata=described(
            "How the loss is computed: tile by tile without keeping logits (`chunked`), or by its formula on all "
            "logits (`dense`). Both give the same losses and gradients, up to rounding; `dense` with `objective: "
            "jsd` rounds as TRL does. A model with an LM head of another kind gets its own logits computed in both, "
            "and a warning says so.",
            choices=["chunked", "dense"],
        ),
    )
    kd_alpha: float = field(
        default=1.0,
        metadata=described(
            "Share of the divergence in the loss; the rest is cross-entropy. Below 1 it needs `lmbda: 0.0`.",
            range="[0, 1]",
        ),
    )
    loca_alpha: float | None = field(
        default=None,
        metadata=described(
            "Switches LoCa (https://huggingface.co/papers/2409.04778) on: where the teacher prefers another token to "
            "the label, its distribution is calibrated so that the label wins by 1 - loca_alpha. Needs `lmbda: 0.0`.",
            range="(0, 1]",
        ),
    )
    hpd_sample: bool = field(
        default=True,
        metadata=described("Whether HPD draws a token from the student at every position; false is an ablation."),
    )
    hpd_reinforce: bool = field(
        default=True,
        metadata=described(
            "Whether HPD sends the mass taken from the drawn token to the label; false is an ablation."
        ),
    )
    teacher_cache: str | None = field(
        default=None,
        metadata=described(
            "Folder written by `hf-rb cache-teacher`, from which the teacher's distributions are read; no teacher is "
            "loaded. For `objective: forward_kl` and `akl` with `lmbda: 0.0`."
        ),
    )
