"""The layout of the package: imports run one way between its folders, and files stay small. Standard library only."""

import ast
import re
import statistics
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "hf_rb"

# From the ground up: a folder imports only from folders before it. `hf_rb/__init__` stands on all.
ORDERS = {
    "": (
        "utils", "methods", "tiny", "io", "objectives", "ops", "advantages", "rl", "agents", "rewards", "judges", "evaluation", "teachers", "hub", "models",
        "quantizers", "weights", "trainers", "recover", "report", "scripts", "cli", "integrations",
    ),
    "quantizers": ("rules", "config", "kernels", "packed", "allocation", "loading", "ptqtp", "d2quant", "folders"),
    "trainers": ("common", "token_samples", "sft", "gkd", "distillation", "grpo", "audit"),
}  # fmt: skip


def modules():
    """Path of every module by its name."""
    paths = sorted(ROOT.rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in paths
    }


MODULES = modules()


def imports(name):
    """What a module imports of the package, also inside functions and for type checkers, with the line."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            found = [f"{'.'.join(base)}.{alias.name}" for alias in node.names]
        else:
            continue
        for one in found:
            while one and one not in MODULES:
                one = one.rpartition(".")[0]
            if one:
                yield one, node.lineno


@pytest.mark.parametrize("folder", ORDERS)
def test_imports_run_one_way(folder):
    order, depth = ORDERS[folder], 2 if folder else 1
    wrong = []
    for name in MODULES:
        parts = name.split(".")
        if len(parts) <= depth or (folder and parts[1] != folder):
            continue
        assert parts[depth] in order, f"{name} has no place in the order of {folder or 'hf_rb'}/"
        for other, line in imports(name):
            there = other.split(".")
            if len(there) <= depth or there[:depth] != parts[:depth]:
                continue
            if order.index(there[depth]) > order.index(parts[depth]):
                wrong.append(f"{MODULES[name]}:{line} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_modules_have_no_circles():
    """Also inside a folder; an `__init__` that gathers public names is left out."""
    arrows = {
        name: {other for other, _ in imports(name) if other != name and MODULES[other].name != "__init__.py"}
        for name in MODULES
        if MODULES[name].name != "__init__.py"
    }
    while ready := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in ready:
            del arrows[name]
    assert not arrows, f"these import each other: {', '.join(sorted(arrows))}"


def test_files_are_small():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert [f"{path}: {count}" for path, count in lines.items() if count > 400] == []
    assert statistics.median(lines.values()) < 120


def imported_names(name):
    """Names that a module imports from modules of the package, or reads as their attributes: module, name, line."""
    tree, known = ast.parse(MODULES[name].read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.ImportFrom) and not node.level else ():
            if f"{node.module}.{alias.name}" in MODULES:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif node.module in MODULES:
                yield node.module, alias.name, node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            if f"{known[node.value.id]}.{node.attr}" not in MODULES:
                yield known[node.value.id], node.attr, node.lineno


def test_no_name_of_another_package_is_private():
    """Neither a module nor a name in one."""
    wrong = []
    for name in MODULES:
        folder = MODULES[name].parent
        for other, line in imports(name):
            if any(part.startswith("_") for part in other.split(".")) and MODULES[other].parent != folder:
                wrong.append(f"{MODULES[name]}:{line} imports {other}")
        for module, what, line in imported_names(name):
            if re.match("_[^_]", what) and MODULES[module].parent != folder:
                wrong.append(f"{MODULES[name]}:{line} uses {module}.{what}")
    assert not wrong, "\n".join(wrong)


def public_names(name):
    """`__all__` of a module, or `None` where it has none or takes it from another."""
    for node in ast.parse(MODULES[name].read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            return ast.literal_eval(node.value)
    return None


def test_names_that_others_import_are_public():
    """A private name for a module of the same folder has an underscore."""
    public = {name: public_names(name) for name in MODULES}
    wrong = [
        f"{module}.__all__ lacks {what}, which {MODULES[name]}:{line} imports"
        for name in MODULES
        for module, what, line in imported_names(name)
        if public[module] is not None and what not in ("*", *public[module]) and not what.startswith("_")
    ]
    assert not wrong, "\n".join(wrong)
