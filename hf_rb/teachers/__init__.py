"""Sources of a teacher's distributions: a model, the student without its adapters, or a cache made beforehand."""

from pathlib import Path
from typing import Any

from hf_rb.teachers.cache_format import bytes_per_token
from hf_rb.teachers.cached import CachedTeacher
from hf_rb.teachers.capture import CacheReport, cache_teacher
from hf_rb.teachers.local import AdapterOffTeacher, LocalTeacher
from hf_rb.teachers.protocol import ModelTeacher, Teacher, TrainerWithTeacher
from hf_rb.teachers.vocabulary import shared_vocabulary


__all__ = [
    "AdapterOffTeacher",
    "CacheReport",
    "CachedTeacher",
    "LocalTeacher",
    "ModelTeacher",
    "Teacher",
    "TrainerWithTeacher",
    "build_teacher",
    "bytes_per_token",
    "cache_teacher",
    "shared_vocabulary",
]


def build_teacher(
    teacher: Teacher | None = None,
    teacher_model: Any = None,
    teacher_cache: str | Path | None = None,
    init_kwargs: dict[str, Any] | None = None,
) -> Teacher:
    """
    Returns the one teacher that was given, in whichever way.

    Args:
        teacher ([`Teacher`], *optional*):
            A teacher.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            What [`LocalTeacher`] takes.
        teacher_cache (`str` or `os.PathLike`, *optional*):
            What [`CachedTeacher`] takes.
        init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for a `teacher_model` given by name.

    Raises:
        ValueError: There is no teacher, or more than one.
    """
    given = {"teacher": teacher, "teacher_model": teacher_model, "teacher_cache": teacher_cache}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        raise ValueError(
            "There is no teacher. Set `teacher_model_name_or_path` to a Hub id, a folder or `tiny:teacher`, or with "
            "GKD `teacher_cache`; or pass `teacher_model`, or `teacher=AdapterOffTeacher()`."
        )
    if len(names) > 1:
        raise ValueError(f"There are several teachers: {', '.join(f'`{name}`' for name in names)}. Keep one of them.")
    if teacher is not None:
        return teacher
    return CachedTeacher(teacher_cache) if teacher_cache is not None else LocalTeacher(teacher_model, init_kwargs)
