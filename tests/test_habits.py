"""What the files for contributors say is true of the repository. Standard library and yaml only."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from test_layout import ORDERS

import hf_rb
from hf_rb.utils.optional import EXTRAS


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = [path for path in (ROOT / "hf_rb").rglob("*.py")]


def test_contributing_lists_folders_in_their_order():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [name for name in ORDERS[""] if (ROOT / "hf_rb" / name).is_dir()]


def test_contributing_lists_make_targets_that_exist():
    named = re.findall(r"`make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= set(targets)


def test_the_tests_of_make_test_first_import_no_torch():
    """In a process of their own: here other tests have imported it."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (marks,) = re.findall(r'^test-first:.*\n\t.* -m "(.*)" \$\(PYTEST_ARGS\)$', makefile, re.MULTILINE)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_torch_free_test_that_imports_torch_fails(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "torch.py").touch()
    (tmp_path / "test_fields.py").write_text("def test_one():\n    import torch\n\ndef test_two(): ...\n")
    (tmp_path / "test_other.py").write_text("raise ValueError('not even imported')")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "torch_free and not slow", "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout
    assert "test_one" in done.stdout and "This test imports torch: see NEEDS_TORCH" in done.stdout


def test_citation_has_the_version_of_the_package():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == hf_rb.__version__


def test_hooks_are_tools_of_the_extra_dev():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert all(repo["repo"] == "local" for repo in config["repos"]), "nothing is downloaded by a hook"
    tools = {hook["entry"].split()[0] for hook in hooks} - {"make"}
    extra = {re.match(r"[\w-]+", one)[0] for one in PROJECT["project"]["optional-dependencies"]["dev"]}
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert tools <= extra and tools | {"pyrefly", "pre-commit"} <= pinned


def test_workflow_covers_what_the_project_says_it_supports():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["project"]["requires-python"] == f">={tested[0]}"
    named = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert named == tested
    allowed = {one["name"]: one["may_fail"] for one in jobs["versions"]["strategy"]["matrix"]["include"]}
    assert allowed == {"lowest": False, "newest": False, "transformers": True, "trl": True}


@pytest.mark.parametrize("pattern", [r"#\s*pyrefly: ignore(?!\[)", r"#\s*pyrefly: ignore-errors", r"#\s*ruff: noqa"])
def test_no_ignore_holds_for_a_file_or_for_everything(pattern):
    found = [path for path in SOURCES if re.search(pattern, path.read_text(encoding="utf-8"))]
    assert found == []


def test_no_file_names_the_host_of_a_package_registry():
    files = [*ROOT.glob("*"), *(ROOT / ".github").rglob("*"), *SOURCES]
    hosts = re.compile(r"\b(?:pypi|test\.pypi|pythonhosted|download\.pytorch|npmjs)\.(?:org|com)\b")
    found = [
        path for path in files if path.is_file() and hosts.search(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert found == []


RIDDLES = {"How", "That", "What", "Whatever", "When", "Where", "Whether", "Which", "Who", "Whom", "Whose", "Why"}


def public_docstrings(path):
    """Name and docstring of a module and of its public classes, functions and methods."""

    def walk(node, name):
        yield name, ast.get_docstring(node) or ""
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        for child in () if isinstance(node, functions) else node.body:
            if isinstance(child, (ast.ClassDef, *functions)) and not child.name.startswith("_"):
                yield from walk(child, f"{name}.{child.name}")

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT)))


def test_no_public_docstring_starts_as_a_riddle():
    named = [one for path in SOURCES for one in public_docstrings(path)]
    assert len(named) > 1000
    found = [f"{name}: {text.splitlines()[0]}" for name, text in named if re.match(r"\w*", text)[0] in RIDDLES]
    assert not found, "start with a verb or a noun of the field (CONTRIBUTING.md):\n" + "\n".join(found)


def test_names_of_tests_have_at_most_60_characters():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")]
    names = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert [name for name in sorted(names) if name.startswith("test_") and len(name) > 60] == []


@pytest.mark.parametrize("word", ["Run", "Verdict", "balance_loss", "examine"])
def test_a_word_that_had_two_meanings_has_one(word):
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    places = [path for path, tree in trees.items() for node in tree.body if getattr(node, "name", None) == word]
    assert len(places) == 1, places


def test_no_module_has_the_name_of_an_optional_package():
    assert [path for path in SOURCES if path.stem in EXTRAS] == []
