"""What is registered, by this package and by others, and what is said of what cannot be used."""

import dataclasses
import inspect
import subprocess
import sys
from importlib import import_module

import pytest
from helpers.plugins import install

from hf_rb.methods import Method, ObjectiveMethod, ShaperMethod, registry, static
from hf_rb.methods.registry import broken, catalog, find, methods, name_problem
from hf_rb.methods.rules import defaults_of


BREVITY = """
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import a_module_that_is_not_there

from hf_rb.methods import Metric, ShaperMethod, flag


@dataclass
class BrevityFlags:
    brevity_alpha: float = flag(0.1, "Strength.", range="[0, 1]")


def _rules(config: Any) -> Iterator[str]:
    if config.brevity_alpha == 0:
        yield "`brevity_alpha: 0.0` does nothing."


class Brevity(a_module_that_is_not_there.Base):
    method = ShaperMethod(
        key="brevity", name="Brevity", summary="Prefers short.", flags=BrevityFlags, rules=_rules, level="token",
    )
"""


@pytest.mark.parametrize("name, method", catalog().items(), ids=catalog())
def test_record_without_an_import_is_that_of_the_module(name, method):
    entry = next(one for one in registry.entries() if one.method.key == name)
    loaded = entry.load()
    loaded = getattr(loaded, "method", loaded)
    for field in dataclasses.fields(method):
        mine, theirs = getattr(method, field.name), getattr(loaded, field.name)
        if field.name == "flags" and mine is not None:
            assert [(one.name, one.default) for one in dataclasses.fields(mine)] == [
                (one.name, one.default) for one in dataclasses.fields(theirs)
            ]
        elif inspect.isfunction(mine):
            assert mine.__name__ == theirs.__name__
        else:
            assert mine == theirs


@pytest.mark.parametrize(
    "entry", [one for one in registry.entries() if one.method.flags], ids=lambda one: one.method.key
)
def test_functions_have_the_defaults_of_the_flags(entry):
    """Of what a module exports; a flag of `None` is off."""
    module, defaults = import_module(entry.module), defaults_of(entry.method)
    exported = [getattr(module, name) for name in module.__all__]
    for function in (one for one in exported if callable(one) and not dataclasses.is_dataclass(one)):
        for name, parameter in inspect.signature(function).parameters.items():
            fields = {f"{entry.method.key}_{name}", name} & defaults.keys()
            if fields and parameter.default is not parameter.empty:
                default = defaults[fields.pop()]
                assert default is None or parameter.default == default, f"{function.__name__}({name})"


def test_records_are_read_without_torch():
    code = "import sys; from hf_rb.methods.registry import catalog; catalog(); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_another_package_is_read_without_its_imports(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", "brevity-pkg", BREVITY, shaper={"brevity": "Brevity"})
    entry = find("shaper", "brevity")
    assert (entry.package, entry.method.level, entry.method.flags.brevity_alpha) == ("brevity-pkg", "token", 0.1)
    assert "brevity" in catalog()
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        entry.load()


BAD = {
    "no record": ("class Brevity: pass", "`Brevity` has no record"),
    "another kind": (
        "from hf_rb.methods import ObjectiveMethod\nclass Brevity:\n    method = ObjectiveMethod(key='brevity', name='B', summary='')",
        "`Brevity` has no record of a shaper",
    ),
    "a field less": (
        "from hf_rb.methods import ShaperMethod\nclass Brevity:\n    method = ShaperMethod(key='brevity', name='B')",
        "TypeError: .*missing 1 required keyword-only argument: 'summary'",
    ),
    "no class": ("x = 1", "does not define `Brevity`"),
    "a syntax error": ("class Brevity(:", "SyntaxError"),
    "another key": (
        "from hf_rb.methods import ShaperMethod\nclass Brevity:\n    method = ShaperMethod(key='b', name='B', summary='')",
        "its record has the key 'b'",
    ),
    "torch in the record": (
        "import torch\nfrom hf_rb.methods import ShaperMethod\n"
        "class Brevity:\n    method = ShaperMethod(key='brevity', name='B', summary=str(torch.zeros(1)))",
        "NameError",
    ),
}


@pytest.mark.parametrize("code, message", BAD.values(), ids=BAD)
def test_broken_entry_point_is_a_sentence_with_its_package(monkeypatch, tmp_path, code, message):
    install(monkeypatch, tmp_path / "site", "brevity-pkg", code, shaper={"brevity": "Brevity"})
    with pytest.raises(ValueError, match=f"'brevity' of the package brevity-pkg .* cannot be used: .*{message}"):
        find("shaper", "brevity")
    assert [*broken("shaper")] == ["brevity"] and "edas" in methods("shaper")


def test_two_packages_with_one_name_are_refused_where_it_is_used(monkeypatch, tmp_path):
    for package in ("one", "two"):
        install(monkeypatch, tmp_path / package, f"{package}-pkg", BREVITY, shaper={"brevity": "Brevity"})
    problem = name_problem("shaper", "brevity", "advantage_shapers")
    assert (
        "The shaper 'brevity' comes with two packages, " in problem and "one-pkg" in problem and "two-pkg" in problem
    )
    assert "srar" in methods("shaper")


def test_package_with_a_name_of_ours_leaves_ours_as_it_is(monkeypatch, tmp_path):
    code = BREVITY.replace('"brevity"', '"edas"')
    install(monkeypatch, tmp_path / "one", "one-pkg", code, shaper={"edas": "Brevity"})
    install(monkeypatch, tmp_path / "two", "two-pkg", "", shaper={"srar": "Nothing"})
    assert find("shaper", "edas").package == find("shaper", "srar").package == "hf_rb"
    assert "comes with two packages, hf_rb and one-pkg" in broken("shaper")["edas"]
    assert "of the package two-pkg" in broken("shaper")["srar"]


def test_key_of_another_kind_of_ours_is_refused(monkeypatch, tmp_path):
    code = BREVITY.replace('"brevity"', '"loca"')
    install(monkeypatch, tmp_path / "site", "loca-pkg", code, shaper={"loca": "Brevity"})
    assert "its key 'loca' is that of a method of hf_rb: give it another" in broken("shaper")["loca"]
    assert catalog()["loca"].name == "LoCa"


def test_names_have_hints():
    assert name_problem("objective", "AKL", "objective") == "`objective` cannot be 'AKL'; did you mean 'akl'?"
    assert "add `--allow_local_code mine:Own`" in name_problem("objective", "mine:Own")


def test_allowed_code_is_a_method_by_its_place(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(BREVITY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "LOCAL", {"mine:Brevity", "shutil:copy", "nowhere:Brevity"})
    assert methods("shaper")["mine:Brevity"].method.key == "brevity"
    assert "mine:Brevity" not in methods("objective")
    assert "no module `nowhere`" in name_problem("shaper", "nowhere:Brevity")
    assert "`copy`" in name_problem("shaper", "shutil:copy")


@pytest.mark.parametrize("method", catalog().values(), ids=catalog())
def test_every_record_is_complete(method: Method):
    assert method.summary.endswith(".") and len(method.summary) < 220
    for field in dataclasses.fields(method.flags) if method.flags else ():
        assert field.metadata["help"].strip().endswith("."), field.name
    for metric in method.metrics:
        assert metric.meaning and not metric.meaning.endswith("."), metric.name
        low, high = map(float, metric.range[1:-1].split(","))
        assert low < high
    if isinstance(method, ObjectiveMethod) and method.completions != "any":
        assert method.because
    if isinstance(method, ShaperMethod):
        assert not method.additive or method.level == "token"


def test_a_class_is_evaluated_with_what_it_needs_alone(monkeypatch, tmp_path):
    code = "from __future__ import annotations\nimport nowhere\nA = 2\nB = A + 1\nC = nowhere.x\ndef f(): return B"
    (tmp_path / "partly.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert static.evaluate("partly", "B") == 3 and static.evaluate("partly", "f")() == 3
    with pytest.raises(NameError, match="nowhere"):
        static.evaluate("partly", "C")
    with pytest.raises(ImportError, match="does not define `D`"):
        static.evaluate("partly", "D")


FORMS = {
    "the future": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_rb import GRPOConfig\n"
    "from hf_rb.methods import ShaperMethod\ndef _rules(config: GRPOConfig):\n    yield from ()\n",
    "a try": "try:\n    from hf_rb.methods import ShaperMethod\nexcept ImportError:\n    raise\n_rules = None\n",
    "a quoted annotation": "from dataclasses import dataclass\nfrom hf_rb.methods import ShaperMethod, flag\n@dataclass\n"
    "class Flags:\n    brevity_alpha: 'float' = flag(0.1, help='Strength.')\n_rules = Flags\n",
}


@pytest.mark.parametrize("code", FORMS.values(), ids=FORMS)
def test_record_is_read_in_the_forms_of_ordinary_modules(monkeypatch, tmp_path, code):
    record = "ShaperMethod(key='brevity', name='B', summary='', rules=_rules)"
    code += f"import nowhere\nclass Brevity(nowhere.Base):\n    method = {record}\n"
    install(monkeypatch, tmp_path / "site", "brevity-pkg", code, shaper={"brevity": "Brevity"})
    assert find("shaper", "brevity").method.name == "B"


def test_record_is_found_where_a_package_hands_it_on(monkeypatch, tmp_path):
    package = tmp_path / "handing"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import Brevity as Short\n")
    (package / "constants.py").write_text("NAME = 'Brevity'\n")
    (package / "inner.py").write_text(
        "import nowhere\nfrom hf_rb.methods import ShaperMethod\nfrom . import constants\n"
        "class Brevity(nowhere.Base):\n    method = ShaperMethod(key='brevity', name=constants.NAME, summary='')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert static.record("handing", "Short").name == "Brevity"
