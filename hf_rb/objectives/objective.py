"""Base classes of the objectives of distillation: the loss of a token, in the tile loop and by its formula on all
logits.

A divergence of your own needs its formula alone; the tile loop then differentiates it by autograd:

    class Squared(Divergence):
        method = ObjectiveMethod(key="squared", name="Squared", summary="Squared difference.", mixes=True)

        def divergence(self, student_logits, teacher_logits, has_rest=False):
            return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)

An objective that is no divergence derives from [`Objective`] and writes both of its methods.
"""

import copy
from typing import Any, ClassVar, Self

import torch
from torch.nn.functional import cross_entropy

from hf_rb.methods.record import ObjectiveMethod
from hf_rb.methods.rules import defaults_of
from hf_rb.objectives.divergences import forward_kl_rule, reverse_kl_rule
from hf_rb.objectives.loca import loca_calibrate, loca_scale
from hf_rb.objectives.token_rule import Term


__all__ = ["Divergence", "Objective", "Tokens", "entropy", "given", "log_prob", "monitored"]

Tokens = dict[str, torch.Tensor]


class Objective:
    """
    A loss by token, as the tile loop of `hf_rb.ops.lm_head` runs it ([`~hf_rb.objectives.token_rule.TokenRule`]).

    Args:
        **flags:
            Its flags, as in the config.

    Attributes:
        method (`ObjectiveMethod`): Its record.
        flags (`Any`): Its flags, an instance of `method.flags`.
        draws (`bool`): Whether it reads `tokens["uniforms"]`, one number from [0, 1) a token.
        sampled (`bool`): Whether of the teacher it reads the log-probabilities of the labels alone,
            `tokens["teacher_logp"]` and `tokens["reference_logp"]`.
        needs_reference (`bool`): Whether it reads a reference model.
        mixture (`tuple[float, float]`): Factors of the logits of teacher and reference in what it compares with.
        aggregation (`str`): How token losses are put together, see
            [`~hf_rb.trainers.common.gopd.token_weights`].
        vanishes (`bool`): Whether its gradient is 0 where the student is its own teacher.
    """

    method: ClassVar[ObjectiveMethod]
    flags: Any = None
    draws: bool = False
    sampled: bool = False
    needs_reference: bool = False
    mixture: tuple[float, float] = (1.0, 0.0)
    aggregation: str = "token-mean"
    vanishes: bool = True

    def __init__(self, **flags: Any):
        self.flags = self.method.flags(**flags) if self.method.flags else None

    @classmethod
    def options(cls, args: Any) -> dict[str, Any]:
        """Returns the arguments of the constructor that a config gives."""
        return {name: getattr(args, name, default) for name, default in defaults_of(cls.method).items()}

    @classmethod
    def from_config(cls, args: Any) -> "Objective":
        """Returns the objective that a config describes."""
        return cls(**cls.options(args))

    def __call__(
        self, log_q: torch.Tensor, log_p: torch.Tensor | None, log_probs: torch.Tensor, tokens: Tokens
    ) -> Term:
        raise NotImplementedError

    def dense(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """
        Returns the loss `(N,)` of every token by the formulas on all logits, for autograd: what the tile loop must
        equal.

        Args:
            student_logits, teacher_logits (`torch.Tensor` of shape `(N, V)`):
                Logits.
            tokens (`dict[str, torch.Tensor]`):
                What [`__call__`] reads, N rows each.
        """
        raise NotImplementedError

    def alone(self) -> Self:
        """Returns the objective without what is mixed into it."""
        return self


class Divergence(Objective):
    """
    A divergence of the student from the teacher, with LoCa and cross-entropy mixed in.

    Needs `tokens["labels"]` when `kd_alpha` is below 1 or `loca_alpha` is set.

    Args:
        kd_alpha (`float`, *optional*, defaults to `1.0`):
            The loss is `(1 - kd_alpha) · cross-entropy + kd_alpha · divergence`.
        loca_alpha (`float`, *optional*):
            Calibrates the teacher first, see [`~hf_rb.objectives.loca_calibrate`].
        monitor (`bool`, *optional*, defaults to `True`):
            Whether to report forward and reverse KL and the entropy too.
        **flags:
            Its own flags.
    """

    def __init__(self, kd_alpha: float = 1.0, loca_alpha: float | None = None, monitor: bool = True, **flags: Any):
        super().__init__(**flags)
        self.kd_alpha, self.loca_alpha, self.monitor = kd_alpha, loca_alpha, monitor

    @classmethod
    def options(cls, args: Any) -> dict[str, Any]:
        mixed = {"kd_alpha": getattr(args, "kd_alpha", 1.0), "loca_alpha": getattr(args, "loca_alpha", None)}
        return super().options(args) | mixed

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, has_rest: bool = False
    ) -> torch.Tensor:
        """
        Returns the divergence `(N,)` of logits `(N, V)`, differentiable by the student's.

        With `has_rest`, of an objective whose record says `cached`, the last column stands for all tokens that the
        others are not.
        """
        raise NotImplementedError

    def with_derivative(
        self, log_q: torch.Tensor, log_p: torch.Tensor, has_rest: bool
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """
        Returns the divergence `(n,)`, its derivative by log_q `(n, E)`, and values to report `(n,)`. By autograd where
        a class does not say it better. `forward_kl` and `reverse_kl` among the values are not computed again.
        """
        with torch.enable_grad():
            student = log_q.detach().requires_grad_()
            loss = self.divergence(student, log_p.detach(), has_rest)
            (derivative,) = torch.autograd.grad(loss.sum(), student)
        return loss.detach(), derivative, {}

    def __call__(
        self, log_q: torch.Tensor, log_p: torch.Tensor | None, log_probs: torch.Tensor, tokens: Tokens
    ) -> Term:
        log_p = given(log_p)
        labels, has_rest, stats, target = tokens.get("labels"), "rest" in tokens, {}, log_p
        if self.loca_alpha is not None:
            label_event = tokens.get("label_event", tokens["labels"])
            target, scale = _calibrate(log_p, label_event, self.loca_alpha, has_rest)
            stats |= {"loca_scale": scale, "loca_corrected": scale < 1}
        loss, dense, more = self.with_derivative(log_q, target, has_rest)
        known = {name: more.pop(name) for name in _MONITORED if name in more}
        stats |= more
        if self.monitor:  # from the teacher before LoCa
            stats |= monitored(log_q, log_p, log_probs, known if target is log_p else None)
        if labels is None:
            return Term(loss, dense, None, None, stats)
        nll = -log_prob(log_probs, labels)
        stats |= {"kd": loss, "nll": nll}
        if self.kd_alpha == 1:
            return Term(loss, dense, None, None, stats)
        share = torch.full_like(nll, self.kd_alpha - 1)
        loss = self.kd_alpha * loss + (1 - self.kd_alpha) * nll
        return Term(loss, dense.mul_(self.kd_alpha), labels.unsqueeze(-1), share.unsqueeze(-1), stats)

    def dense(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        labels, has_rest = tokens.get("labels"), "rest" in tokens
        if self.loca_alpha is not None and labels is not None:
            probs = teacher_logits.float().softmax(-1)
            teacher_logits = loca_calibrate(probs, labels, self.loca_alpha, has_rest).log()
        losses = self.divergence(student_logits, teacher_logits, has_rest)
        if self.kd_alpha == 1 or labels is None:
            return losses
        nll = cross_entropy(student_logits.float(), labels, reduction="none")
        return self.kd_alpha * losses + (1 - self.kd_alpha) * nll

    def alone(self) -> Self:
        plain = copy.copy(self)
        plain.kd_alpha, plain.loca_alpha = 1.0, None
        return plain


_MONITORED = {"forward_kl": forward_kl_rule, "reverse_kl": reverse_kl_rule}


def monitored(
    log_q: torch.Tensor, log_p: torch.Tensor, log_probs: torch.Tensor, known: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Returns both divergences and the entropy. `known` holds those divergences that the loss has computed already."""
    known = known or {}
    both = {name: known[name] if name in known else rule(log_q, log_p)[0] for name, rule in _MONITORED.items()}
    return both | {"entropy": entropy(log_probs)}


def given(log_p: torch.Tensor | None) -> torch.Tensor:
    """Returns the teacher's log-probabilities.

    Raises:
        TypeError: There are none.
    """
    if log_p is None:
        raise TypeError("This objective compares the student with a teacher, and none is given. Pass `teacher`.")
    return log_p


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Returns the entropy `(n,)` of log-probabilities `(n, V)`, in nats."""
    return torch.special.entr(log_probs.exp()).sum(-1)


def log_prob(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the log-probability `(n,)` of one id a row."""
    return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


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
