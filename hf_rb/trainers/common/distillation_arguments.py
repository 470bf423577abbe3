"""The fields that several configs share: their only definition, mixed into `SFTConfig`, `GKDConfig` and
`DistillationConfig`.
"""

from dataclasses import dataclass, field

from hf_rb.utils.fields import described


__all__ = ["GopdArguments", "ObjectiveArguments", "PackingArguments"]


@dataclass
class PackingArguments:
    """
    Treatment of a model that mixes packed sequences.

    Args:
        allow_leaking_packing (`bool`, *optional*, defaults to `False`):
            Whether to train a model that lets the sequences of a packed row see each other, as TRL does. By default
            the first packed batch of a run is compared with one of its sequences alone, and such a model is refused.
            Acts with `packing`, `padding_free` or a collator that packs.
    """

    allow_leaking_packing: bool = field(
        default=False,
        metadata=described(
            "Whether to train a model that lets the sequences of a packed row see each other, as TRL does. By "
            "default the first packed batch of a run is compared with one of its sequences alone, and such a model "
            "is refused."
        ),
    )


@dataclass
class ObjectiveArguments:
    """
    Objective of the student.

    Args:
        objective (`str`, *optional*, defaults to `"jsd"`):
            `"jsd"`, TRL's generalized Jensen-Shannon divergence with its `beta`; `"forward_kl"`, KL(teacher ‖
            student); `"reverse_kl"`, KL(student ‖ teacher); `"akl"`, adaptive KL
            (https://huggingface.co/papers/2404.02657); `"hpd"`, hybrid policy distillation
            (https://huggingface.co/papers/2604.20244), on dataset completions; `"gopd"`, generalized on-policy
            distillation (https://huggingface.co/papers/2602.12125), on the student's completions.
        akl_mu (`float`, *optional*, defaults to `0.5`):
            Teacher mass of the head of adaptive KL, in `(0, 1]`.
        akl_head_rule (`str`, *optional*, defaults to `"paper"`):
            `"paper"`: the head is the smallest set of tokens that reaches `akl_mu`; `"code"`: without the token that
            crosses it, as in the authors' code.
    """

    objective: str = field(
        default="jsd",
        metadata=described(
            "What the student minimises: TRL's generalized Jensen-Shannon divergence (`jsd`), KL(teacher ‖ student) "
            "(`forward_kl`), KL(student ‖ teacher) (`reverse_kl`), adaptive KL (`akl`), hybrid policy distillation "
            "on dataset completions (`hpd`), or generalized on-policy distillation (`gopd`).",
            choices=["jsd", "forward_kl", "reverse_kl", "akl", "hpd", "gopd"],
        ),
    )
    akl_mu: float = field(default=0.5, metadata=described("Teacher mass of the head of adaptive KL.", range="(0, 1]"))
    akl_head_rule: str = field(
        default="paper",
        metadata=described(
            "The head of adaptive KL: the smallest set of tokens that reaches `akl_mu` (`paper`), or without the "
            "token that crosses it (`code`, the authors').",
            choices=["paper", "code"],
        ),
    )


@dataclass
class GopdArguments:
    """
    Fields of `objective="gopd"`.

    Args:
        reward_scale (`float`, *optional*, defaults to `1.0`):
            Weight of the reward log(teacher / reference), at least 0. 1 is on-policy distillation, above 1 the student
            extrapolates past the teacher (ExOPD; the paper uses 1.25).
        reference_model_name_or_path (`str`, *optional*):
            The reference. By default the student at its start; the teacher's own base gives the paper's reward
            correction. Not read when `reward_scale` is 1, where the reference cancels.
        gopd_aggregation (`str`, *optional*, defaults to `"seq-mean-token-mean"`):
            How token losses are put together: the mean over completions of each one's mean (the authors' recipe), the
            mean over all tokens (`"token-mean"`), or the mean over completions of each one's sum
            (`"seq-mean-token-sum"`, the paper's equation).
        gopd_tis_cap (`float`, *optional*):
            Cap of the truncated importance weight between trainer and sampler; the authors' scripts use 5. Needs a
            sampler that reports log-probabilities.
        gopd_logratio_clamp (`float`, *optional*):
            Bound of the absolute value of every log-ratio. Not in the paper.
        gopd_full_vocab (`bool`, *optional*, defaults to `False`):
            Whether to minimise, at every state, the reverse KL of which the sampled loss is an estimate, over the
            whole vocabulary: less variance, another LM-head product. Not in the paper.
        gopd_teacher_column (`str`, *optional*):
            Dataset column that names the teacher of each example, of several.
    """

    reward_scale: float = field(
        default=1.0,
        metadata=described(
            "Weight of the reward log(teacher / reference) of `objective: gopd`: 1 is on-policy distillation, above "
            "1 the student extrapolates past the teacher (ExOPD; the paper uses 1.25).",
            range="[0, inf)",
        ),
    )
    reference_model_name_or_path: str | None = field(
        default=None,
        metadata=described(
            "The reference of `objective: gopd`. By default the student at its start; the teacher's own base gives "
            "the paper's reward correction."
        ),
    )
    gopd_aggregation: str = field(
        default="seq-mean-token-mean",
        metadata=described(
            "How the token losses of `objective: gopd` are put together: the mean over completions of each one's "
            "mean (the authors' recipe), the mean over all tokens, or the mean over completions of each one's sum "
            "(the paper's equation).",
            choices=["seq-mean-token-mean", "token-mean", "seq-mean-token-sum"],
        ),
    )
    gopd_tis_cap: float | None = field(
        default=None,
        metadata=described(
            "Cap of the truncated importance weight between trainer and sampler (the authors' scripts: 5). Needs a "
            "sampler that reports log-probabilities.",
            range="(0, inf)",
        ),
    )
    gopd_logratio_clamp: float | None = field(
        default=None,
        metadata=described(
            "Bound of the absolute value of every log-ratio of `objective: gopd`. Not in the paper.", range="(0, inf)"
        ),
    )
    gopd_full_vocab: bool = field(
        default=False,
        metadata=described(
            "Whether `objective: gopd` minimises, at every state, the reverse KL of which its sampled loss is an "
            "estimate, over the whole vocabulary. Not in the paper."
        ),
    )
    gopd_teacher_column: str | None = field(
        default=None,
        metadata=described("Dataset column that names the teacher of each example, where there are several."),
    )
