"""The page of methods in the documentation, and the verb that lists what is installed."""

import json
from pathlib import Path

import pytest
from helpers.plugins import install

from hf_rb.cli import main
from hf_rb.io.resources import resource_folder
from hf_rb.methods.registry import PACKAGE, entries, find
from hf_rb.methods.tables import methods_page, runs


ROOT = Path(__file__).parents[2]
OURS = [entry.method for entry in entries() if entry.package == PACKAGE]
BREVITY = """
from hf_rb.methods import ShaperMethod

class Brevity:
    method = ShaperMethod(key="brevity", name="Brevity", summary="Prefers short completions.")
"""


def test_page_of_methods_is_in_step():
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert page == methods_page(), "run `make generated`"


@pytest.mark.parametrize(
    "key, expected",
    {
        "jsd": (True, True, True, True, False),
        "forward_kl": (True, True, True, True, True),
        "akl": (True, True, True, True, True),
        "hpd": (True, False, False, False, False),
        "gopd": (False, False, True, True, False),
    }.items(),
)
def test_objectives_run_where_the_design_says(key, expected):
    assert runs(find("objective", key).method) == expected


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.key)
def test_every_method_with_a_paper_has_card_and_recipe(method):
    if method.paper is None:
        return
    assert (resource_folder("model_cards") / f"{method.key}.md").is_file()
    recipe = {"gopd": "exopd"}.get(method.key, method.key)
    if method.kind in ("objective", "shaper", "quantizer"):
        assert (resource_folder("recipes") / recipe / "tiny-cpu.yaml").is_file()


def test_methods_lists_what_is_installed(monkeypatch, tmp_path, capsys):
    install(monkeypatch, tmp_path / "one", "brevity-pkg", BREVITY, shaper={"brevity": "Brevity"})
    install(monkeypatch, tmp_path / "two", "broken-pkg", "class Nothing: pass", objective={"nothing": "Nothing"})
    assert main(["methods"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "objective: akl 2404.02657 Distillation that weighs" in text
    assert "brevity - [brevity-pkg] Prefers short completions." in text
    assert "warning: The objective 'nothing' of the package broken-pkg (broken_pkg:Nothing) cannot be used" in text
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    [akl] = [one for one in listed["methods"] if one["key"] == "akl"]
    assert akl["paper"] == "https://huggingface.co/papers/2404.02657" and "akl_mu" in akl["flags"]
    assert "akl/weight" in akl["metrics"] and len(listed["problems"]) == 1
