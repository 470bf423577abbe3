"""ProFit: supervised fine-tuning on the tokens the model already finds probable
(https://huggingface.co/papers/2601.09195).

With p_t = π(y_t | x, y_<t) the probability that the model in training gives to label t of T,

    loss = -1/T Σ_t M_t log p_t,    M_t = 1[sg(p_t) > τ]

`sg` stops the gradient: the gate is decided on the value of p_t and passes no gradient of its own. T counts every
label, gated or not, so a strict gate also means a smaller step.

Shapes: `...` is any shape, usually (batch, sequence); entry t belongs to label t (nothing shifts).
"""

import math

import torch

from hf_rb.methods import Method, Paper


__all__ = ["MODES", "profit_mask"]

METHOD = Method(
    key="profit",
    name="ProFit",
    paper=Paper(
        "2601.09195",
        "ProFit: Leveraging High-Value Signals in SFT via Probability-Guided Token Selection",
        "Tao Liu, Taiqiang Wu, Runming Yang, Shaoning Sun, Junjie Wang, Yujiu Yang",
    ),
    summary="Supervised fine-tuning that takes no gradient from target tokens to which the model being "
    "trained gives a probability of at most a threshold.",
)

MODES = ("higher", "lower", "middle", "random")


def profit_mask(
    log_probs: torch.Tensor,
    threshold: float,
    mode: str = "higher",
    inclusive: bool = False,
    threshold_high: float | None = None,
    uniforms: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Says which tokens ProFit trains on. Paper: https://huggingface.co/papers/2601.09195

    Args:
        log_probs (`torch.Tensor` of shape `(...)`):
            Log-probability of each label under the model in training. No gradient flows through the mask.
        threshold (`float`):
            Threshold τ in `[0, 1]`.
        mode (`str`, *optional*, defaults to `"higher"`):
            `"higher"` keeps p > τ (the method); the paper's ablations are `"lower"`, which keeps p < τ, `"middle"`,
            which keeps τ < p < `threshold_high`, and `"random"`, which drops every token with probability τ whatever
            its p.
        inclusive (`bool`, *optional*, defaults to `False`):
            Whether a probability equal to a threshold is kept, as in the authors' code, rather than dropped, as in the
            paper. Has no effect with `mode="random"`.
        threshold_high (`float`, *optional*):
            Upper threshold in `[threshold, 1]`; given if and only if `mode="middle"`.
        uniforms (`torch.Tensor` of shape `(...)`, *optional*):
            Draws from [0, 1), used by `mode="random"` only: a token is kept where its draw is at least τ.

    Returns:
        `torch.Tensor` of shape `(...)` and type `bool`: `True` where the token is trained on.

    Raises:
        ValueError: A threshold outside its range, an unknown mode, or a mode without the argument it needs.
    """
    if mode not in MODES:
        raise ValueError(f"`mode={mode!r}` is unknown. Choose one of {', '.join(map(repr, MODES))}.")
    if (mode == "middle") != (threshold_high is not None):
        raise ValueError(f"`threshold_high` belongs to `mode='middle'`; got mode={mode!r}, {threshold_high=}.")
    if not 0 <= threshold <= (1 if threshold_high is None else threshold_high) <= 1:
        raise ValueError(f"Thresholds are probabilities, the lower one first; got {threshold=}, {threshold_high=}.")
    if mode == "random":
        if uniforms is None:
            raise ValueError("`mode='random'` needs `uniforms`, one draw from [0, 1) per token.")
        return uniforms >= threshold

    # Logarithms are compared, not probabilities: exp underflows to 0 for improbable labels, and τ = 0 must keep them.
    log_probs = log_probs.detach().float()
    above, below = (torch.ge, torch.le) if inclusive else (torch.gt, torch.lt)
    if mode == "higher":
        return above(log_probs, _log(threshold))
    if threshold_high is None:  # "lower"
        return below(log_probs, _log(threshold))
    return above(log_probs, _log(threshold)) & below(log_probs, _log(threshold_high))


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
