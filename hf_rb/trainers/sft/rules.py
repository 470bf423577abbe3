"""Rules for the ProFit fields of `SFTConfig`, each of which yields what is wrong with them. Standard library only:
`hf-rb check` runs these without torch.
"""

from collections.abc import Iterator
from typing import Any


__all__ = ["profit_rules"]


def profit_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the ProFit fields of an [`SFTConfig`]."""
    if config.profit_threshold is None:
        changed = {
            "profit_mode": config.profit_mode != "higher",
            "profit_threshold_high": config.profit_threshold_high is not None,
            "profit_inclusive": config.profit_inclusive,
            "profit_normalize": config.profit_normalize != "all",
        }
        for name in (name for name, is_changed in changed.items() if is_changed):
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
