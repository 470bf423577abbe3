"""The token rules that the tile loop of `hf_rb.ops.lm_head` runs: the loss of each objective, mixed and calibrated as
configured.
"""

from dataclasses import dataclass

import torch

from hf_rb.objectives.akl import adaptive_kl_rule
from hf_rb.objectives.divergences import forward_kl_rule, jsd_rule, reverse_kl_rule
from hf_rb.objectives.gopd import gopd_advantage
from hf_rb.objectives.hpd import hpd_rule, inverse_cdf_sample
from hf_rb.objectives.loca import loca_scale
from hf_rb.objectives.token_rule import Term


__all__ = ["DivergenceRule", "GopdRule", "HpdRule", "ObjectiveRule"]


def _column(*values: torch.Tensor) -> torch.Tensor:
    return torch.stack(values, dim=-1)


def _given(log_p: torch.Tensor | None) -> torch.Tensor:
    if log_p is None:
        raise TypeError("This objective compares the student with a teacher, and none is given. Pass `teacher`.")
    return log_p


def _log_prob(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _entropy(log_probs: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(log_probs.exp()).sum(-1)


_MONITORED = {"forward_kl": forward_kl_rule, "reverse_kl": reverse_kl_rule}


def _monitored(
    log_q: torch.Tensor, log_p: torch.Tensor, log_probs: torch.Tensor, known: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Returns both divergences and the entropy. `known` holds those divergences that the loss has computed already."""
    known = known or {}
    both = {name: known[name] if name in known else rule(log_q, log_p)[0] for name, rule in _MONITORED.items()}
    return both | {"entropy": _entropy(log_probs)}


@dataclass(frozen=True)
class DivergenceRule:
    """A divergence from the teacher: `jsd`, `forward_kl`, `reverse_kl` or `akl`, with LoCa and cross-entropy mixed in.

    Needs `tokens["labels"]` when `kd_alpha` is below 1 or `loca_alpha` is set.

    Args:
        objective (`str`):
            Name of the divergence.
        beta (`float`, *optional*, defaults to `0.5`):
            Of `jsd`.
        akl_mu, akl_head_rule:
            Of `akl`, see [`~hf_rb.objectives.adaptive_kl`].
        kd_alpha (`float`, *optional*, defaults to `1.0`):
            The loss is `(1 - kd_alpha) · cross-entropy + kd_alpha · divergence`.
        loca_alpha (`float`, *optional*):
            Calibrates the teacher first, see [`~hf_rb.objectives.loca_calibrate`].
        monitor (`bool`, *optional*, defaults to `True`):
            Whether to report both divergences and the entropy, whatever the objective.
    """

    objective: str
    beta: float = 0.5
    akl_mu: float = 0.5
    akl_head_rule: str = "paper"
    kd_alpha: float = 1.0
    loca_alpha: float | None = None
    monitor: bool = True

    def __call__(
        self, log_q: torch.Tensor, log_p: torch.Tensor | None, log_probs: torch.Tensor, tokens: dict[str, torch.Tensor]
    ) -> Term:
        log_p = _given(log_p)
        labels, has_rest, stats, target = tokens.get("labels"), "rest" in tokens, {}, log_p
        if self.loca_alpha is not None:
            label_event = tokens.get("label_event", tokens["labels"])
            target, stats["loca_scale"] = _calibrate(log_p, label_event, self.loca_alpha, has_rest)
        loss, dense, more = self._divergence(log_q, target, has_rest)
        known = {name: more.pop(name) for name in _MONITORED if name in more}
        stats |= more
        if self.monitor:  # from the teacher before LoCa
            stats |= _monitored(log_q, log_p, log_probs, known if target is log_p else None)
        if labels is None:
            return Term(loss, dense, None, None, stats)
        nll = -_log_prob(log_probs, labels)
        stats |= {"kd": loss, "nll": nll}
        if self.kd_alpha == 1:
            return Term(loss, dense, None, None, stats)
        share = torch.full_like(nll, self.kd_alpha - 1)
        loss = self.kd_alpha * loss + (1 - self.kd_alpha) * nll
        return Term(loss, dense.mul_(self.kd_alpha), labels.unsqueeze(-1), share.unsqueeze(-1), stats)

    def _divergence(
        self, log_q: torch.Tensor, log_p: torch.Tensor, has_rest: bool
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss, its derivative, and values by the way, among them the divergences that it is made of."""
        if self.objective == "akl":
            return adaptive_kl_rule(log_q, log_p, self.akl_mu, self.akl_head_rule, has_rest)
        if self.objective == "jsd":
            return *jsd_rule(log_q, log_p, self.beta), {}
        loss, dense = _MONITORED[self.objective](log_q, log_p)
        return loss, dense, {self.objective: loss}


def _calibrate(
    log_p: torch.Tensor, label_event: torch.Tensor, alpha: float, has_rest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """LoCa on log-probabilities; `label_event` is the label's place among the events. Returns (log p', s)."""
    index = label_event.unsqueeze(-1)
    label = log_p.gather(-1, index).exp()
    rivals = log_p[..., :-1] if has_rest else log_p
    scale = loca_scale(rivals.amax(-1, keepdim=True).exp(), label, alpha)
    calibrated = (log_p + scale.log()).scatter(-1, index, torch.log1p(-scale * (1 - label)))
    return torch.where(scale == 1, log_p, calibrated), scale.squeeze(-1)


@dataclass(frozen=True)
class HpdRule:
    """HPD. Needs `tokens["labels"]` and `tokens["uniforms"]`, one draw from [0, 1) a token.

    Args:
        sample, reinforce (`bool`, *optional*, default to `True`):
            See [`~hf_rb.objectives.hpd_weights`].
        monitor (`bool`, *optional*, defaults to `True`):
            As of [`DivergenceRule`].
    """

    sample: bool = True
    reinforce: bool = True
    monitor: bool = True

    def __call__(
        self, log_q: torch.Tensor, log_p: torch.Tensor | None, log_probs: torch.Tensor, tokens: dict[str, torch.Tensor]
    ) -> Term:
        labels, log_p = tokens["labels"], _given(log_p)
        more = _monitored(log_q, log_p, log_probs) if self.monitor else {}
        samples = inverse_cdf_sample(log_q.exp(), tokens["uniforms"])
        loss, values, stats = hpd_rule(log_q, log_p, labels, samples, self.sample, self.reinforce)
        stats |= {"nll": -_log_prob(log_probs, labels), **more}
        return Term(loss, None, _column(labels, samples), values.T, stats)


@dataclass(frozen=True)
class GopdRule:
    """G-OPD on sampled tokens.

    Needs `tokens["labels"]` (the sampled ids) and `tokens["teacher_logp"]`; `tokens["reference_logp"]` unless the
    scale is 1; `tokens["sampler_logp"]` for truncated importance weights.

    Args:
        reward_scale (`float`, *optional*, defaults to `1.0`):
            λ of [`~hf_rb.objectives.gopd_advantage`].
        tis_cap (`float`, *optional*):
            Upper bound of the importance weight q / sampler.
        logratio_clamp (`float`, *optional*):
            Bound of the absolute value of every log-ratio. Not in the paper.
    """

    reward_scale: float = 1.0
    tis_cap: float | None = None
    logratio_clamp: float | None = None

    def __call__(
        self,
        log_q: torch.Tensor,
        log_p: torch.Tensor | None,
        log_probs: torch.Tensor,
        tokens: dict[str, torch.Tensor],
    ) -> Term:
        labels, teacher, reference = tokens["labels"], tokens["teacher_logp"], tokens.get("reference_logp")
        student = _log_prob(log_probs, labels)
        teacher, reference = self.clamped(student, teacher, reference)
        advantage = gopd_advantage(student, teacher, reference, self.reward_scale)
        stats = {"advantage": advantage, "reverse_kl_sampled": student - teacher, "entropy": _entropy(log_probs)}
        if reference is not None:
            stats |= {"reward": teacher - reference, "reference_kl_sampled": student - reference}
        if self.tis_cap is not None:
            log_weight = (student - tokens["sampler_logp"]).nan_to_num(0)  # NaN: the sampler did not say
            weight = log_weight.clamp(-20, 20).exp().clamp(max=self.tis_cap)
            stats["tis_weight"] = weight
            advantage = weight * advantage
        # The ratio q / sg[q] is 1 in value; the derivative of -A q / sg[q] by log q is -A.
        return Term(-advantage, None, labels.unsqueeze(-1), -advantage.unsqueeze(-1), stats)

    def clamped(
        self, student: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the log-probabilities of teacher and reference with both log-ratios within the bound."""
        bound = self.logratio_clamp
        if bound is None:
            return teacher, reference
        bounded = student + (teacher - student).clamp(-bound, bound)
        return bounded, None if reference is None else bounded - (teacher - reference).clamp(-bound, bound)


ObjectiveRule = DivergenceRule | GopdRule | HpdRule
