"""ProFit: supervised fine-tuning on the tokens the model already finds probable
(https://huggingface.co/papers/2601.09195).

With p_t = π(y_t | x, y_<t) the probability that the model in training gives to label t of T,

    loss = -1/T Σ_t M_t log p_t,    M_t = 1[sg(p_t) > τ]

`sg` stops the gradient: the gate is decided on the value of p_t and passes no gradient of its own. T counts every
label, gated or not, so a strict gate also means a smaller step.

Shapes: `...` is any shape, usually (batch, sequence); entry t belongs to label t (nothing shifts).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from hf_rb.methods import Method, Metric, Paper, flag


__all__ = ["MODES", "ProfitFlags", "profit_mask"]


@dataclass
class ProfitFlags:
    """Flags of ProFit."""

    profit_threshold: float | None = flag(
        None,
        "Switches ProFit (https://huggingface.co/papers/2601.09195) on: only labels to which the model in "
        "training gives a probability above this threshold, enter the loss. The authors' code recommends `0.1`; "
        "`0` keeps every label, `None` is off.",
        range="[0, 1]",
    )
    profit_mode: str = flag(
        "higher",
        "Which labels are kept: `higher`, those above the threshold (the method), or one of the paper's ablations:"
        " `lower`, those below it; `middle`, those between it and `profit_threshold_high`; `random`, each with "
        "probability `1 - profit_threshold`, drawn from the seed, the step and the example, so that the draw does "
        "not depend on how examples are batched.",
        choices=["higher", "lower", "middle", "random"],
    )
    profit_threshold_high: float | None = flag(
        None, 'Upper threshold in `[0, 1]` of `profit_mode="middle"`.', range="[0, 1]"
    )
    profit_inclusive: bool = flag(
        False, "Whether a probability equal to a threshold is kept, as in the authors' code; the paper drops it."
    )
    profit_normalize: str = flag(
        "all",
        "What the sum over kept labels is divided by. `all`: the number of labels, kept or not, in the whole batch"
        " (over accumulation steps and processes), as in the authors' code. `sequence`: the number of labels of "
        "the label's own sequence, and then the number of sequences in the whole batch, as in the paper's equation"
        ' 5; with packing, every packed document is a sequence, unless `packing_strategy="wrapped"` has lost '
        "where they end: then every row is. `kept`: the number of kept labels (another method, with larger steps);"
        " needs one process and no gradient accumulation.",
        choices=["all", "sequence", "kept"],
    )


def _rules(config: Any) -> Iterator[str]:
    if config.profit_threshold is None:
        for field in fields(ProfitFlags):
            name = field.name
            if getattr(config, name) == field.default:
                continue
            yield (
                f"`{name}: {getattr(config, name)}` has no effect without `profit_threshold`. "
                f"Set `profit_threshold: 0.1` (the authors' recommendation), or remove `{name}`."
            )
        return

    low, high = config.profit_threshold, config.profit_threshold_high
    if config.profit_mode == "middle" and (high is None or high <= low):
        yield (
            f"`profit_mode: middle` keeps probabilities between `profit_threshold: {low}` and "
            f"`profit_threshold_high: {high}`. Set `profit_threshold_high` to a number above `profit_threshold`."
        )
    if config.profit_mode != "middle" and high is not None:
        yield (
            f"`profit_threshold_high: {high}` acts with `profit_mode: middle` only, and the mode is "
            f"{config.profit_mode!r}. Remove `profit_threshold_high`, or set `profit_mode: middle`."
        )
    if config.profit_mode == "random" and config.profit_inclusive:
        yield (
            "`profit_inclusive: true` has no effect with `profit_mode: random`, which compares no probability. "
            "Remove it."
        )
    if config.profit_normalize == "kept" and config.gradient_accumulation_steps > 1:
        yield (
            "`profit_normalize: kept` divides by the number of kept tokens, which is not known before the last of "
            f"`gradient_accumulation_steps: {config.gradient_accumulation_steps}` has run. Set "
            "`gradient_accumulation_steps: 1` with a larger `per_device_train_batch_size`, or `profit_normalize: "
            "all`."
        )
    if config.loss_type == "dft":
        yield (
            "`loss_type: dft` weighs tokens by their probability and `profit_threshold` gates them by it: two "
            "methods. Set `loss_type: nll` for ProFit, or remove `profit_threshold` for DFT."
        )
    if config.label_smoothing_factor > 0:
        yield (
            f"`label_smoothing_factor: {config.label_smoothing_factor}` trains on every label of the vocabulary, and "
            "`profit_threshold` gates the one label of the data. Set `label_smoothing_factor: 0`, or remove "
            "`profit_threshold`."
        )


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
    flags=ProfitFlags,
    rules=_rules,
    metrics=(
        Metric("profit/loss", "loss on the kept labels, divided by all labels", "[0, inf)", "lower"),
        Metric("profit/nll", "cross-entropy on all labels, in nats", "[0, inf)", "lower"),
        Metric("profit/kept_fraction", "share of labels that are kept", "[0, 1]"),
        Metric("profit/kept_prob", "mean probability of the kept labels", "[0, 1]"),
        Metric("profit/dropped_prob", "mean probability of the dropped labels", "[0, 1]"),
        Metric("profit/eos_kept_rate", "share of end-of-sequence labels that are kept", "[0, 1]"),
    ),
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
