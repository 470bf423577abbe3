"""Fields of a library's config class, read from its source, however the source writes the base classes."""

import shutil
import sys
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest

from hf_rb.cli.check import check, read_recipe
from hf_rb.cli.schemas import libraries
from hf_rb.cli.schemas.libraries import class_fields
from hf_rb.io.resources import find_recipe


NAMES = map("library_{}".format, count())
BASES = """
import dataclasses, enum, typing

T = typing.TypeVar("T")

class Level(enum.Enum):
    LOW = "low"

@dataclasses.dataclass
class Base(typing.Generic[T]):
    inherited: int = 1
"""


@pytest.fixture
def fields(tmp_path, monkeypatch):
    """Fields of the class `Config` of a package, which has modules `bases` and `inner.bases`."""

    def read(start, base, end="own: str = ''"):
        name = next(NAMES)  # modules are read once
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner/__init__.py").write_text("from . import bases\n")
        for place in ("bases.py", "inner/bases.py"):
            (tmp_path / name / place).write_text(BASES)
        source = f"from dataclasses import dataclass\n{start}\n@dataclass\nclass Config({base}):\n    {end}\n"
        (tmp_path / name / "__init__.py").write_text(source.replace("library", name))
        return class_fields(f"{name}:Config")

    monkeypatch.syspath_prepend(tmp_path)
    return read


@pytest.mark.parametrize(
    ("start", "base"),
    [
        ("from abc import ABC", "ABC"),
        ("import abc", "abc.ABC"),
        ("from collections import UserDict", "UserDict"),
        ("import collections.abc", "collections.abc.Mapping"),
        ("from typing import Generic, TypeVar\nT = TypeVar('T')", "Generic[T]"),
        ("from collections import namedtuple", "namedtuple('Pair', 'a b')"),
        ("", "object"),
        ("import no_such_library", "no_such_library.Base"),
        ("from no_such_library import Base", "Base"),
        ("from _struct import Struct", "Struct"),
        ("from .compiled import Base", "Base"),
        ("from . import Base", "Base"),
        ("", "Undefined"),
    ],
)
def test_a_base_without_fields_or_source_adds_none(fields, start, base):
    assert list(fields(start, base)) == ["own"]


@pytest.mark.parametrize(
    ("start", "base"),
    [
        ("from .bases import Base", "Base"),
        ("from .bases import Base", "Base[int]"),
        ("from .bases import Base", 'Base["int"]'),
        ("from .bases import Base as Other", "Other"),
        ("from . import bases", "bases.Base"),
        ("from . import bases as other", "other.Base[int]"),
        ("import library.bases", "library.bases.Base"),
        ("import library.bases as other", "other.Base"),
        ("import library as other", "other.inner.bases.Base"),
        ("from .inner import bases", "bases.Base"),
        ("from .inner.bases import Base\nfrom abc import ABC", "ABC, Base"),
    ],
)
def test_a_base_is_found_however_it_is_imported(fields, start, base):
    assert list(fields(start, base)) == ["inherited", "own"]


@pytest.mark.parametrize("name", ["other.Level", "Level"])
def test_an_enumeration_is_found_however_it_is_imported(fields, name):
    start = "import library.bases as other\nfrom library.bases import Level"
    entry = fields(start, "", f"own: {name} = {name}.LOW")["own"]
    assert (entry["types"], entry["default"], entry["choices"]) == (["str"], "low", ["low"])


def test_a_module_that_is_one_file_is_read(tmp_path, monkeypatch):
    (tmp_path / "one_file.py").write_text(BASES)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(class_fields("one_file:Base")) == ["inherited"]


def test_check_takes_a_trl_whose_config_has_a_standard_base(tmp_path, monkeypatch):
    shutil.copytree(Path(find_spec("trl").origin).parent, tmp_path / "trl", ignore=shutil.ignore_patterns("*.pyc"))
    file = tmp_path / "trl/trainer/sft_config.py"
    source = file.read_text()
    file.write_text(
        source.replace("\n@dataclass\nclass SFTConfig(", "\nimport abc\n@dataclass\nclass SFTConfig(abc.ABC, ")
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trl", raising=False)  # which others may have imported
    for cached in (libraries._module, libraries._fields):
        monkeypatch.setattr(libraries, cached.__name__, cached.__wrapped__)
    path = find_recipe("profit/tiny-cpu")
    assert libraries._module("trl.trainer.sft_config").names["abc"]
    assert check(path, read_recipe(path)).errors == []
