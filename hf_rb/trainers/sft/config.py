"""Configuration of [`SFTTrainer`]: TRL's, with ProFit's fields and a word on packing."""

from dataclasses import dataclass

import trl

from hf_rb.objectives.profit import ProfitFlags
from hf_rb.trainers.common.configs import ConfigMixin
from hf_rb.trainers.common.distillation_arguments import PackingArguments
from hf_rb.trainers.common.rules import packing_rules, trainer_rules
from hf_rb.utils.fields import documented


__all__ = ["SFTConfig"]


@documented
@dataclass
class SFTConfig(ConfigMixin, PackingArguments, ProfitFlags, trl.SFTConfig):
    r"""
    Configuration class for the [`SFTTrainer`].

    Everything in [`~trl.SFTConfig`], and the fields below. Without `profit_threshold` the trainer is TRL's, but for
    models that mix packed sequences, see `allow_leaking_packing`.

    Raises:
        ValueError: A value out of its range, or fields that exclude one another; ProFit also refuses `loss_type="dft"`
            and `label_smoothing_factor > 0`.
    """

    _rules = (trainer_rules, packing_rules)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profit_normalize == "kept" and self.world_size > 1:
            raise ValueError(
                f"`profit_normalize: kept` needs one process, and there are {self.world_size}: no process knows how "
                "many labels the others keep before its own backward pass. Use `profit_normalize: all`."
            )
