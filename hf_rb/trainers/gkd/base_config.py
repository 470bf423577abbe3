"""TRL's `GKDConfig`, or the same fields where TRL has none."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trl

from hf_rb.utils import compat
from hf_rb.utils.fields import documented, flag


__all__ = ["GKDArguments", "GKDBaseConfig"]


@documented
@dataclass
class GKDArguments(trl.SFTConfig):
    """
    The fields of TRL's experimental `GKDConfig` (1.16), which TRL may remove without notice.
    """

    _VALID_DICT_FIELDS = trl.SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    temperature: float = flag(0.9, "Temperature of sampling.")
    lmbda: float = flag(0.5, "Share of the steps that train on the student's own completions.", range="[0, 1]")
    beta: float = flag(0.5, "Of `jsd`, in `[0, 1]`: 0 is forward KL, 1 is reverse KL.", range="[0, 1]")
    max_new_tokens: int = flag(128, "Limit of a completion in tokens.")
    teacher_model_name_or_path: str | None = flag(
        None,
        "Model name or path of the teacher.",
    )
    teacher_model_init_kwargs: dict | str | None = flag(
        None, "Keyword arguments of `from_pretrained` for a teacher given by name."
    )
    disable_dropout: bool = flag(True, "Whether the student is trained without dropout.")
    seq_kd: bool = flag(False, "Whether the other steps train on completions of the teacher, not of the dataset.")


if TYPE_CHECKING:
    GKDBaseConfig = GKDArguments
else:
    GKDBaseConfig = GKDArguments if compat.is_removed("GKDConfig") else compat.GKDConfig
