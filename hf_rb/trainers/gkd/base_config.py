"""TRL's `GKDConfig`, or the same fields where TRL has none."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trl

from hf_rb.utils import compat
from hf_rb.utils.fields import described


__all__ = ["GKDArguments", "GKDBaseConfig"]


@dataclass
class GKDArguments(trl.SFTConfig):
    """
    The fields of TRL's experimental `GKDConfig` (1.16), which TRL may remove without notice.

    Args:
        temperature (`float`, *optional*, defaults to `0.9`):
            Temperature of sampling.
        lmbda (`float`, *optional*, defaults to `0.5`):
            Share of the steps that train on the student's own completions, in `[0, 1]`.
        beta (`float`, *optional*, defaults to `0.5`):
            Of `"jsd"`, in `[0, 1]`: 0 is forward KL, 1 is reverse KL.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Limit of a completion in tokens.
        teacher_model_name_or_path (`str`, *optional*):
            The teacher.
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for a teacher given by name.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether the student is trained without dropout.
        seq_kd (`bool`, *optional*, defaults to `False`):
            Whether the other steps train on completions of the teacher, not of the dataset.
    """

    _VALID_DICT_FIELDS = trl.SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    temperature: float = field(default=0.9, metadata=described("Temperature of sampling."))
    lmbda: float = field(
        default=0.5,
        metadata=described("Share of the steps that train on the student's own completions.", range="[0, 1]"),
    )
    beta: float = field(
        default=0.5, metadata=described("Of `objective: jsd`: 0 is forward KL, 1 is reverse KL.", range="[0, 1]")
    )
    max_new_tokens: int = field(default=128, metadata=described("Limit of a completion in tokens."))
    teacher_model_name_or_path: str | None = field(
        default=None, metadata=described("Model name or path of the teacher.")
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None, metadata=described("Keyword arguments of `from_pretrained` for a teacher given by name.")
    )
    disable_dropout: bool = field(default=True, metadata=described("Whether the student is trained without dropout."))
    seq_kd: bool = field(
        default=False,
        metadata=described("Whether the other steps train on completions of the teacher, not of the dataset."),
    )


if TYPE_CHECKING:
    GKDBaseConfig = GKDArguments
else:
    GKDBaseConfig = GKDArguments if compat.is_removed("GKDConfig") else compat.GKDConfig
