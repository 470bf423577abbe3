"""G-OPD: on-policy distillation with a reward scale; above 1 it extrapolates (ExOPD,
https://huggingface.co/papers/2602.12125).

With q the student, T the teacher and R the reference, all read at a token y that the student has drawn, the advantage
of y is

    A = sg[λ (log T - log R) - (log q - log R)]

and the loss -A ρ with ρ = q / sg[q], which is 1 in value. The paper's equation 14 prints -A, a cost, under a maximum;
the released code negates it, as here. λ = 1 is ordinary on-policy distillation, where R cancels and is not needed. At
every state the expected gradient is that of KL(q ‖ M), M ∝ T^λ R^(1-λ).

Shapes: `(...)`, one entry a token; float32. Nothing is whitened or clipped: that would erase the signal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from hf_rb.methods import Metric, ObjectiveMethod, Paper, flag
from hf_rb.objectives.objective import Objective, Tokens, entropy, log_prob
from hf_rb.objectives.standard import ReverseKL
from hf_rb.objectives.token_rule import Term


__all__ = ["GOPD", "GOPDFullVocab", "GopdFlags", "gopd_advantage"]


@dataclass
class GopdFlags:
    """Flags of `objective: gopd`."""

    reward_scale: float = flag(
        1.0,
        "Weight of the reward log(teacher / reference) of `objective: gopd`: 1 is on-policy distillation, above 1 the "
        "student extrapolates past the teacher (ExOPD; the paper uses 1.25).",
        range="[0, inf)",
    )
    reference_model_name_or_path: str | None = flag(
        None,
        "The reference of `objective: gopd`. By default the student at its start, which reads the student's prompts: "
        "with LoRA the model without its adapters, else a frozen copy. The teacher's own base gives the paper's "
        "reward correction. Not read when `reward_scale` is 1, where the reference cancels.",
    )
    gopd_aggregation: str = flag(
        "seq-mean-token-mean",
        "How the token losses of `objective: gopd` are put together, exactly, over accumulation steps and processes: "
        "the mean over completions of each one's mean (the authors' recipe), the mean over all tokens, or the mean "
        "over completions of each one's sum (the paper's equation).",
        choices=["seq-mean-token-mean", "token-mean", "seq-mean-token-sum"],
    )
    gopd_tis_cap: float | None = flag(
        None,
        "Cap of the truncated importance weight between trainer and sampler (the authors' scripts: 5). Needs a "
        "sampler that reports log-probabilities: `DistillationTrainer` with `use_vllm: true`.",
        range="(0, inf)",
    )
    gopd_logratio_clamp: float | None = flag(
        None,
        "Bound of the absolute value of every log-ratio of `objective: gopd`. Not in the paper.",
        range="(0, inf)",
    )
    gopd_full_vocab: bool = flag(
        False,
        "Whether `objective: gopd` minimises, at every state, the reverse KL of which its sampled loss is an "
        "estimate, over the whole vocabulary: less variance, another LM-head product. Not in the paper.",
    )
    gopd_teacher_column: str | None = flag(
        None,
        "Dataset column that names the teacher of each example, where `teacher_model_name_or_path` names several.",
    )


def _rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the values where `objective: gopd`."""
    # Anything that makes the completions other than draws from the distribution that the loss is about.
    neutral = {
        "temperature": (1.0,),
        "top_p": (1.0,),
        "top_k": (0,),
        "min_p": (None, 0.0),
        "repetition_penalty": (1.0,),
    }
    for name, values in neutral.items():
        value = getattr(config, name, values[0])
        if value not in values:
            yield (
                f"`objective: gopd` needs `{name}: {values[0]}`: its loss is about the distribution that completions "
                f"are drawn from; got `{name}: {value}`."
            )
    overridden = getattr(config, "generation_kwargs", None) or {}
    for name in sorted({*neutral, "do_sample", "num_beams"} & {*overridden} if isinstance(overridden, dict) else ()):
        yield (
            f"`generation_kwargs: {{{name}: {overridden[name]}}}` replaces plain draws from the student, which "
            f"`objective: gopd` is about. Remove `{name}`."
        )
    if config.reward_scale == 1 and config.reference_model_name_or_path is not None:
        yield (
            "`reference_model_name_or_path` has no effect with `reward_scale: 1.0`, where the reference cancels. Set "
            "`reward_scale: 1.25` (the paper's value), or remove the reference."
        )
    for name in ("gopd_tis_cap", "gopd_logratio_clamp"):
        if config.gopd_full_vocab and getattr(config, name) is not None:
            yield (
                f"`{name}: {getattr(config, name)}` acts on sampled tokens, and `gopd_full_vocab: true` is about all "
                "of them. Remove one of the two."
            )
    if config.gopd_tis_cap is not None and not getattr(config, "use_vllm", False):
        yield (
            f"`gopd_tis_cap: {config.gopd_tis_cap}` needs a sampler that reports log-probabilities, and without vLLM "
            "the sampler is the model in training itself. Set `use_vllm: true` with `DistillationTrainer`, or remove "
            "`gopd_tis_cap`."
        )
    yield from _teacher_rules(config)


def _teacher_rules(config: Any) -> Iterator[str]:
    if hasattr(config, "seq_kd"):
        if config.gopd_teacher_column is not None:
            yield (
                "`gopd_teacher_column` needs the columns of the dataset, which GKD has turned into tokens. Use "
                "`DistillationTrainer` (`hf-rb distillation`)."
            )
        return
    if config.gopd_full_vocab and config.gopd_teacher_column is not None:
        yield (
            "`gopd_full_vocab: true` compares the student with one teacher's logits, and `gopd_teacher_column` names "
            "several teachers. Remove one of the two."
        )


def gopd_advantage(
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    reference_logp: torch.Tensor | None,
    reward_scale: float = 1.0,
) -> torch.Tensor:
    """
    Advantage of every sampled token (the negative of equation 14).

    Args:
        student_logp (`torch.Tensor` of shape `(...)`):
            log q of the token.
        teacher_logp (`torch.Tensor` of shape `(...)`):
            log T of the token.
        reference_logp (`torch.Tensor` of shape `(...)` or `None`):
            log R of the token. May be `None` if and only if `reward_scale` is 1, where it cancels.
        reward_scale (`float`, *optional*, defaults to `1.0`):
            λ: the paper uses 1 (OPD) and 1.25 (ExOPD).

    Returns:
        `torch.Tensor` of shape `(...)`: Advantage, detached.

    Raises:
        ValueError: A scale other than 1 without a reference.
    """
    student_logp, teacher_logp = student_logp.detach().float(), teacher_logp.detach().float()
    advantage = teacher_logp - student_logp
    if reward_scale == 1:
        return advantage
    if reference_logp is None:
        raise ValueError(
            f"reward_scale={reward_scale} needs the reference's log-probabilities: only at 1 does the reference "
            "cancel."
        )
    return advantage + (reward_scale - 1) * (teacher_logp - reference_logp.detach().float())


class GOPD(Objective):
    """
    G-OPD on sampled tokens, as an objective.

    Reads `tokens["labels"]` (the sampled ids), `tokens["teacher_logp"]`, `tokens["reference_logp"]` unless the scale
    is 1, and `tokens["sampler_logp"]` for truncated importance weights.
    """

    method = ObjectiveMethod(
        key="gopd",
        name="G-OPD",
        paper=Paper(
            "2602.12125",
            "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
            "Wenkai Yang, Weijie Liu, Ruobing Xie, Kai Yang, Saiyong Yang, Yankai Lin",
        ),
        summary="On-policy distillation with a reference model and a scale of the reward log(teacher / reference); "
        "above 1 (ExOPD) the student extrapolates past the teacher.",
        flags=GopdFlags,
        rules=_rules,
        completions="student",
        because="its advantage is defined on tokens that the student has drawn",
        metrics=(
            Metric("gopd/advantage", "G-OPD advantage", stat="advantage", extremes=True),
            Metric("gopd/reward", "log(teacher / reference) of the sampled tokens", stat="reward", extremes=True),
            Metric(
                "gopd/teacher_log_ratio",
                "log(student / teacher) of the sampled tokens, an estimate of KL(student ‖ teacher)",
                better="lower",
                stat="reverse_kl_sampled",
            ),
            Metric(
                "gopd/reference_log_ratio",
                "log(student / reference) of the sampled tokens, an estimate of KL(student ‖ reference)",
                stat="reference_kl_sampled",
            ),
            Metric("gopd/tis_weight", "truncated importance weight", "[0, inf)", stat="tis_weight"),
        ),
    )
    flags: GopdFlags
    sampled = True

    def __init__(self, **flags: Any):
        super().__init__(**flags)
        self.needs_reference = self.flags.reward_scale != 1
        self.aggregation = self.flags.gopd_aggregation

    @classmethod
    def from_config(cls, args: Any) -> Objective:
        options = cls.options(args)
        return GOPDFullVocab(**options) if args.gopd_full_vocab else cls(**options)

    def __call__(
        self, log_q: torch.Tensor, log_p: torch.Tensor | None, log_probs: torch.Tensor, tokens: Tokens
    ) -> Term:
        labels, teacher, reference = tokens["labels"], tokens["teacher_logp"], tokens.get("reference_logp")
        student = log_prob(log_probs, labels)
        teacher, reference = self._clamped(student, teacher, reference)
        advantage = gopd_advantage(student, teacher, reference, self.flags.reward_scale)
        stats = {"advantage": advantage, "reverse_kl_sampled": student - teacher, "entropy": entropy(log_probs)}
        if reference is not None:
            stats |= {"reward": teacher - reference, "reference_kl_sampled": student - reference}
        if self.flags.gopd_tis_cap is not None:
            stats["tis_weight"] = self._importance(student, tokens)
            advantage = stats["tis_weight"] * advantage
        # The ratio q / sg[q] is 1 in value; the derivative of -A q / sg[q] by log q is -A.
        return Term(-advantage, None, labels.unsqueeze(-1), -advantage.unsqueeze(-1), stats)

    def dense(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        log_q = -cross_entropy(student_logits.float(), tokens["labels"], reduction="none")
        teacher, reference = self._clamped(log_q.detach(), tokens["teacher_logp"], tokens.get("reference_logp"))
        advantage = gopd_advantage(log_q, teacher, reference, self.flags.reward_scale)
        if self.flags.gopd_tis_cap is not None:
            advantage = self._importance(log_q.detach(), tokens) * advantage
        return -advantage * (log_q - log_q.detach()).exp()

    def _importance(self, student: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Returns the truncated importance weights of the labels; 1 where the sampler did not say (NaN)."""
        log_weight = (student - tokens["sampler_logp"]).nan_to_num(0)
        return log_weight.clamp(-20, 20).exp().clamp(max=self.flags.gopd_tis_cap)

    def _clamped(
        self, student: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the log-probabilities of teacher and reference with both log-ratios within the bound."""
        bound = self.flags.gopd_logratio_clamp
        if bound is None:
            return teacher, reference
        bounded = student + (teacher - student).clamp(-bound, bound)
        return bounded, None if reference is None else bounded - (teacher - reference).clamp(-bound, bound)


class GOPDFullVocab(ReverseKL):
    """Reverse KL to the mixture T^λ R^(1-λ): at every state, what the sampled loss estimates."""

    method = GOPD.method
    flags: GopdFlags

    def __init__(self, **flags: Any):
        super().__init__(**flags)
        scale = self.flags.reward_scale
        self.needs_reference, self.mixture = scale != 1, (scale, 1 - scale)
        self.aggregation = self.flags.gopd_aggregation
