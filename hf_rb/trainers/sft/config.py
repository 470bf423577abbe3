"""Configuration of [`SFTTrainer`]: TRL's, with ProFit's fields and a word on packing."""

from dataclasses import dataclass

import trl

from hf_rb.trainers.common.configs import ConfigMixin
from hf_rb.trainers.common.distillation_arguments import PackingArguments
from hf_rb.trainers.common.rules import packing_rules
from hf_rb.trainers.sft.rules import profit_rules
from hf_rb.utils.fields import documented, flag


__all__ = ["SFTConfig"]


@documented
@dataclass
class SFTConfig(ConfigMixin, PackingArguments, trl.SFTConfig):
    r"""
    Configuration class for the [`SFTTrainer`].

    Everything in [`~trl.SFTConfig`], and the fields below. Without `profit_threshold` the trainer is TRL's, but for
    models that mix packed sequences, see `allow_leaking_packing`.

    Raises:
        ValueError: A value out of its range, or fields that exclude one another; ProFit also refuses `loss_type="dft"`
            and `label_smoothing_factor > 0`.
    """

    _rules = (profit_rules, packing_rules)

    profit_threshold: float | None = flag(
        None,
        "Switches ProFit (https://huggingface.co/papers/2601.09195) on: only labels to which the model in training"
        " gives a probability above this threshold, in `[0, 1]`, enter the loss. The authors' code recommends "
        "`0.1`; `0` keeps every label, `None` is off.",
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profit_normalize == "kept" and self.world_size > 1:
            raise ValueError(
                f"`profit_normalize: kept` needs one process, and there are {self.world_size}: no process knows how "
                "many labels the others keep before its own backward pass. Use `profit_normalize: all`."
            )
