"""LoCa: calibrates the teacher where it is wrong about the label (https://huggingface.co/papers/2409.04778, equations
1-6).

Where another class k has more teacher probability than the label y,

    p'_i = s p_i  (i ≠ y),    p'_y = 1 - s (1 - p_y),    s = α / (1 - p_y + p_k),

and p' = p elsewhere. The calibrated teacher prefers the label by a margin of exactly 1 - α and keeps the ratios among
all other classes. Since p' = s p + (1 - s) onehot(y), distilling from p' mixes the label in where the teacher errs,
and only there.

Of a cached teacher, all tokens that are not stored are one event, the rest. It is no class of its own and no rival of
the label; a cache stores the most probable token and the label, so that s is exact.

Shapes: probabilities `(..., V)`, labels `(...)`; float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hf_rb.methods import Method, Metric, Paper, flag
from hf_rb.objectives.mixing import label_rules


__all__ = ["LocaFlags", "loca_calibrate", "loca_scale"]


@dataclass
class LocaFlags:
    """Flags of LoCa."""

    loca_alpha: float | None = flag(
        None,
        "Switches LoCa (https://huggingface.co/papers/2409.04778) on: where the teacher prefers another token to "
        "the label, its distribution is calibrated so that the label wins by `1 - loca_alpha`. Needs `lmbda=0`.",
        range="(0, 1]",
    )


def _rules(config: Any) -> Iterator[str]:
    if config.loca_alpha is None:
        return
    yield from label_rules(config, "loca_alpha")
    if config.seq_kd:
        yield (
            f"`loca_alpha: {config.loca_alpha}` corrects the teacher by the labels of the dataset, and with `seq_kd: "
            "true` the labels are the teacher's own. Remove one of the two."
        )


METHOD = Method(
    key="loca",
    name="LoCa",
    paper=Paper(
        "2409.04778",
        "LoCa: Logit Calibration for Knowledge Distillation",
        "Runming Yang, Taiqiang Wu, Yujiu Yang",
    ),
    summary="Distillation from a teacher that is calibrated wherever it prefers another token to the label, so that "
    "the label wins by a small margin.",
    flags=LocaFlags,
    rules=_rules,
    metrics=(
        Metric("loca/scale", "LoCa scale", "(0, 1]", stat="loca_scale"),
        Metric(
            "loca/corrected_fraction",
            "share of tokens where LoCa calibrates the teacher",
            "[0, 1]",
            stat="loca_corrected",
        ),
    ),
)


def loca_scale(top: torch.Tensor, label: torch.Tensor, alpha: float = 0.95) -> torch.Tensor:
    """
    Returns s of every position: 1 where the teacher is right.

    Args:
        top (`torch.Tensor` of shape `(...)`):
            Largest teacher probability of the position.
        label (`torch.Tensor` of shape `(...)`):
            Teacher probability of the label. A tie with `top` counts as right.
        alpha (`float`, *optional*, defaults to `0.95`):
            α in `(0, 1]`; the margin of the label is 1 - α. The paper's runs use 0.9 to 1.

    Raises:
        ValueError: `alpha` outside `(0, 1]`.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} must be in (0, 1]: the label wins by a margin of 1 - alpha.")
    return torch.where(top > label, alpha / (1 - label + top), 1.0)


def loca_calibrate(
    teacher_probs: torch.Tensor, labels: torch.Tensor, alpha: float = 0.95, has_rest: bool = False
) -> torch.Tensor:
    """
    Calibrates the teacher's distribution where its most probable token is not the label.

    Args:
        teacher_probs (`torch.Tensor` of shape `(..., V)`):
            Teacher probabilities.
        labels (`torch.Tensor` of shape `(...)`):
            Token ids. Positions labelled -100, or with an id of `V` and above, come back unchanged.
        alpha (`float`, *optional*, defaults to `0.95`):
            See [`loca_scale`].
        has_rest (`bool`, *optional*, defaults to `False`):
            Whether the last column stands for all tokens that the others are not, as in a cached teacher.

    Returns:
        `torch.Tensor` of shape `(..., V)`: Calibrated probabilities, detached; they sum to one where `teacher_probs`
        do.
    """
    probs = teacher_probs.detach().float()
    known = (labels >= 0) & (labels < probs.shape[-1])
    index = labels.where(known, 0).unsqueeze(-1)
    label = probs.gather(-1, index)
    scale = loca_scale((probs[..., :-1] if has_rest else probs).amax(-1, keepdim=True), label, alpha)
    calibrated = (scale * probs).scatter(-1, index, 1 - scale * (1 - label))
    return calibrated.where((known & (scale.squeeze(-1) != 1)).unsqueeze(-1), probs)
