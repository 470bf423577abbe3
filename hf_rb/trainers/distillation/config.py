"""Configuration of [`DistillationTrainer`]: TRL's, with the objectives and G-OPD's fields."""

from dataclasses import dataclass
from typing import Any

import trl

from hf_rb.objectives.akl import AklFlags
from hf_rb.objectives.gopd import GopdFlags
from hf_rb.objectives.skewed_kl import SkewedKlFlags
from hf_rb.trainers.common.configs import ConfigMixin
from hf_rb.trainers.common.distillation_arguments import ObjectiveArguments
from hf_rb.trainers.distillation.rules import distillation_rules, only_gkd
from hf_rb.utils.fields import documented, flag


__all__ = ["DistillationConfig"]


class _WithoutDataset:
    """Refuses keyword arguments of [`GKDConfig`] alone, and names the trainer that takes them. It is a base class, so
    that the signature of the config stays as it is.
    """

    def __new__(cls, *args: Any, **kwargs: Any):
        for problem in filter(None, map(only_gkd, kwargs)):
            raise TypeError(problem)
        return super().__new__(cls)


@documented
@dataclass
class DistillationConfig(
    _WithoutDataset, ConfigMixin, AklFlags, GopdFlags, ObjectiveArguments, SkewedKlFlags, trl.DistillationConfig
):
    r"""
    Configuration class for the [`DistillationTrainer`].

    Everything in [`~trl.DistillationConfig`], and the fields below. With `objective="jsd"` the trainer is TRL's.

    Raises:
        ValueError: A value out of its range, or fields that exclude one another.
        TypeError: A field of [`GKDConfig`] alone; the message says what to do.
    """

    _rules = (distillation_rules,)
    _VALID_DICT_FIELDS = trl.DistillationConfig._VALID_DICT_FIELDS + ["teacher_model_name_or_path"]

    teacher_model_name_or_path: dict[str, str] | str | None = flag(  # pyrefly: ignore[bad-override]
        None,
        'The teacher; with `gopd_teacher_column`, teachers by the names in that column, such as `{"math": '
        '"org/math-teacher", "code": "org/code-teacher"}`.',
    )
