"""Packages of the extras: what says that one is missing names the extra."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import hf_rb
from hf_rb.utils.optional import EXTRAS, import_optional, missing


@pytest.mark.parametrize("package", EXTRAS)
def test_an_extra_installs_what_it_is_named_for(package):
    name, extra = EXTRAS[package]
    project = tomllib.loads((Path(hf_rb.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert any(one.startswith(name) for one in project["optional-dependencies"][extra])


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_package_is_one_sentence_with_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    name, extra = EXTRAS[package]
    with pytest.raises(ImportError) as error:
        import_optional(f"{package}.part" if package == "lm_eval" else package, "This")
    assert str(error.value) == f"This needs {name}. Run `pip install 'hf_rb[{extra}]'`."


def test_a_package_that_lacks_something_says_what():
    error = ModuleNotFoundError("No module named 'requests'", name="requests")
    expected = "This needs lm-eval (No module named 'requests'). Run `pip install 'hf_rb[eval]'`."
    assert str(missing("lm_eval", "This", error)) == expected


def test_what_is_there_is_imported():
    assert import_optional("json", "This") is import_module("json")
