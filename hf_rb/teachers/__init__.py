"""Where a teacher's distributions come from: a model, the student without its adapters, or a cache made beforehand."""

from hf_rb.teachers.local import AdapterOffTeacher, LocalTeacher
from hf_rb.teachers.protocol import ModelTeacher, Teacher
from hf_rb.teachers.vocabulary import shared_vocabulary


__all__ = ["AdapterOffTeacher", "LocalTeacher", "ModelTeacher", "Teacher", "shared_vocabulary"]
