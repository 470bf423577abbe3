"""Configuration of [`GKDTrainer`]: TRL's, with the objectives, their mixtures and the cached teacher."""

from dataclasses import dataclass

from hf_rb.objectives.akl import AklFlags
from hf_rb.objectives.gopd import GopdFlags
from hf_rb.objectives.hpd import HpdFlags
from hf_rb.objectives.loca import LocaFlags
from hf_rb.objectives.mixing import MixtureFlags
from hf_rb.objectives.skewed_kl import SkewedKlFlags
from hf_rb.trainers.common.configs import ConfigMixin
from hf_rb.trainers.common.distillation_arguments import ObjectiveArguments, PackingArguments
from hf_rb.trainers.common.rules import packing_rules
from hf_rb.trainers.gkd.base_config import GKDBaseConfig
from hf_rb.trainers.gkd.rules import gkd_rules
from hf_rb.utils.fields import documented, flag


__all__ = ["GKDConfig"]


@documented
@dataclass
class GKDConfig(
    ConfigMixin,
    AklFlags,
    GopdFlags,
    HpdFlags,
    LocaFlags,
    MixtureFlags,
    ObjectiveArguments,
    PackingArguments,
    SkewedKlFlags,
    GKDBaseConfig,
):
    r"""
    Configuration class for the [`GKDTrainer`].

    Everything in TRL's `GKDConfig`, and the fields below. `temperature` is that of sampling; losses are at temperature
    1. `objective: hpd` needs `lmbda: 0.0`, `objective: gopd` needs `lmbda: 1.0` and `temperature: 1.0`.

    Raises:
        ValueError: A value out of its range, or fields that exclude one another.
    """

    _rules = (gkd_rules, packing_rules)

    loss_impl: str = flag(
        "chunked",
        "`chunked` goes through the LM heads tile by tile and keeps no logits; `dense` is the formula on all logits, "
        "the reference that the other is tested against. Both give the same losses and gradients, up to rounding: in "
        "both, half precision ends before the logits. The exception is `dense` with `objective: jsd` alone, which is "
        "TRL's computation with TRL's rounding. The first step compares each model's own logits with its hidden "
        "states through its LM head; where they differ, its own logits are used, with a warning.",
        choices=["chunked", "dense"],
    )
    teacher_cache: str | None = flag(
        None,
        "Folder written by `hf-rb cache-teacher`, from which the teacher's distributions are read; no teacher is "
        "loaded. For `objective: forward_kl` and `akl` with `lmbda: 0.0`.",
    )
