import ast
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import hf_rb
from hf_rb.scripts.doctor.behaviours import behaviours, check_parameters
from hf_rb.scripts.doctor.findings import Skipped
from hf_rb.utils import compat, optional, versions


BEHAVIOURS = behaviours()


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda one: one.check.__name__)
def test_the_libraries_do_what_we_rely_on(behaviour):
    try:
        behaviour.check()
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", compat.TABLE)
def test_every_name_resolves_and_takes_the_parameters_we_pass(name):
    try:
        check_parameters(name)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert compat.TABLE[name].library in versions.TESTED


def test_every_name_is_checked_by_behaviour():
    checked = {name for behaviour in BEHAVIOURS for name in behaviour.names}
    assert checked == compat.TABLE.keys() | compat.ATTRIBUTES.keys()


PACKAGE = Path(hf_rb.__file__).parent
LIBRARIES = ("transformers", "trl", "peft", "accelerate")
# Methods in `TABLE`, and attributes.
KNOWN = {one.attribute.rpartition(".")[2] for one in compat.TABLE.values()} | compat.ATTRIBUTES.keys()
# Private names that are none of these libraries'.
OTHERS = {
    *("_fused_head_is_checked", "_packing_is_checked"),  # ours, on a trainer
    *("_actions", "_ArgumentGroup", "_asdict", "_getframe", "_replace"),  # argparse, named tuples, sys
    *(
        "_buffers",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_modules",
        "_parameters",
        "_version",
        "_cdata",
        "_non_persistent_buffers_set",
    ),  # torch
}


def test_every_private_attribute_of_others_is_in_a_table():
    """What no class and no function of ours defines or sets is somebody else's."""
    used, ours = {}, set(OTHERS)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Name) and isinstance(getattr(node, "target", node), ast.Name):
                ours.add(getattr(node, "target", node).id)
            elif isinstance(node, ast.Attribute) and re.match("_[a-zA-Z]", node.attr):
                used.setdefault(node.attr, f"{path.relative_to(PACKAGE)}:{node.lineno}")
                if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
                    ours.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
                if isinstance(node.args[1], ast.Constant) and re.match("_[a-zA-Z]", node.args[1].value):
                    used.setdefault(node.args[1].value, f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert {name: place for name, place in used.items() if name not in ours | KNOWN} == {}


def test_every_private_method_that_we_override_is_in_a_table():
    missing = {}
    for module in pkgutil.walk_packages([str(PACKAGE)], "hf_rb."):
        if module.name.endswith("__main__") or "triton" in module.name:
            continue
        for kind in vars(import_module(module.name)).values():
            if not (isinstance(kind, type) and kind.__module__ == module.name):
                continue
            foreign = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
            for name in vars(kind):
                theirs = any(name in vars(base) for base in foreign)
                if re.match("_[a-zA-Z]", name) and theirs and name not in KNOWN | {"_abc_impl"}:
                    missing[f"{kind.__module__}.{kind.__qualname__}.{name}"] = module.name
    assert missing == {}


def test_type_checkers_see_every_name():
    """The block under `TYPE_CHECKING` imports what `TABLE` lists under a name without a dot."""
    tree = ast.parse(inspect.getsource(compat))
    (block,) = [one for one in tree.body if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"]
    shown = {alias.asname or alias.name: (one.module, alias.name) for one in block.body for alias in one.names}
    assert shown == {name: (entry.module, entry.attribute) for name, entry in compat.TABLE.items() if "." not in name}
    assert shown.keys() <= set(compat.__all__)


PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extra=None):
    """The ranges of pyproject.toml by name."""
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return dict(re.match(r"([\w-]+)(.*)", one).groups() for one in listed)


def test_ranges_are_those_of_the_project():
    declared = requirements()
    for library, (floor, ceiling) in versions.RANGES.items():
        assert declared[library] == f">={floor}" + (f",<{ceiling}" if ceiling else "")
    constraints = (PACKAGE.parent / "constraints.txt").read_text()
    for library, tested in versions.TESTED.items():
        assert re.search(rf"^{library}==(\d+\.\d+)", constraints, re.MULTILINE)[1] in tested


def imported_packages():
    """Every package that the sources import, anywhere in a file, with one of the files."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            found |= {module.partition(".")[0]: path.relative_to(PACKAGE) for module in modules}
    return {name: path for name, path in found.items() if name not in {"hf_rb", *sys.stdlib_module_names}}


def test_every_package_that_is_imported_is_declared():
    imported = {"pyyaml" if name == "yaml" else name: path for name, path in imported_packages().items()}
    needed = {name: path for name, path in imported.items() if name not in optional.EXTRAS}
    assert {name: path for name, path in needed.items() if name not in requirements()} == {}
    assert requirements().keys() - needed.keys() == set(), "these are declared, and nothing imports them"


@pytest.mark.parametrize("name", optional.EXTRAS)
def test_every_optional_package_is_in_its_extra(name):
    distribution, extra = optional.EXTRAS[name]
    assert distribution in requirements(extra)


@pytest.mark.parametrize(
    "installed, message",
    [
        ({"transformers": "5.22.2"}, "hf_rb needs transformers>=5.23,<6 (installed: 5.22.2): run `pip install 'transformers>=5.23,<6'`."),
        ({"transformers": "6.0.0.dev0"}, "hf_rb needs transformers>=5.23,<6 (installed: 6.0.0.dev0): run `pip install 'transformers>=5.23,<6'`."),
        ({"trl": "2.0"}, "hf_rb needs trl>=1.16,<2 (installed: 2.0): run `pip install 'trl>=1.16,<2'`."),
        ({"peft": "0.20.0"}, "hf_rb needs peft>=0.21,<1 (installed: 0.20.0): run `pip install 'peft>=0.21,<1'`."),
        ({"peft": None}, "hf_rb needs peft>=0.21,<1 (not installed): run `pip install 'peft>=0.21,<1'`."),
        (
            {"trl": "1.15.0", "accelerate": None},
            "hf_rb needs trl>=1.16,<2 (installed: 1.15.0) and accelerate>=1.15 (not installed): run `pip install 'trl>=1.16,<2' "
            "'accelerate>=1.15'`.",
        ),
    ],
)  # fmt: skip
def test_unsupported_versions_are_one_sentence(monkeypatch, installed, message):
    pretend(monkeypatch, installed)
    with pytest.raises(ImportError) as error:
        versions.check_versions()
    assert str(error.value) == message


@pytest.mark.parametrize(
    "installed", [{}, {"transformers": "5.23"}, {"transformers": "5.99.1"}, {"transformers": "5.25.0.dev0", "trl": "1.99", "peft": "0.30"}]
)  # fmt: skip
def test_supported_versions_pass(monkeypatch, installed):
    pretend(monkeypatch, installed)
    versions.check_versions()


def pretend(monkeypatch, installed):
    """Lets the metadata say other versions."""
    real = versions.metadata.version

    def version(name):
        if name in installed and installed[name] is None:
            raise versions.metadata.PackageNotFoundError(name)
        return installed.get(name) or real(name)

    monkeypatch.setattr(versions, "_supported", False)
    monkeypatch.setattr(versions.metadata, "version", version)


OLD = "hf_rb needs transformers>=5.23,<6 (installed: 5.22.2): run `pip install 'transformers>=5.23,<6'`."


@pytest.fixture
def old_transformers(tmp_path):
    """Runs Python where the metadata of a transformers that is not there lies first on the path."""
    (tmp_path / "transformers-5.22.2.dist-info").mkdir()
    (tmp_path / "transformers-5.22.2.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.22.2\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}

    def run(arguments):
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.mark.parametrize(
    "use",
    ["hf_rb.PTQTPConfig", "hf_rb.SFTTrainer", "hf_rb.apply_mpi", "hf_rb.quantizers.quantize"],
)
def test_the_first_real_use_says_the_versions(use, old_transformers):
    """Before anything of another version is imported."""
    program = f"""
import sys
import hf_rb
hf_rb.tiny.path("student")
try:
    {use}
except ImportError as error:
    print([*{{"torch", "transformers", "trl", "peft"}} & set(sys.modules)], error)
"""
    found = old_transformers(["-c", program])
    assert found.stdout == f"[] {OLD}\n"


def test_a_verb_says_the_versions_in_one_line(old_transformers):
    for verb in ("check", "quantize"):
        found = old_transformers(["-m", "hf_rb.cli", verb, "profit/tiny-cpu"])
        assert (found.returncode, found.stdout, found.stderr) == (2, "", f"hf-rb {verb}: error: {OLD}\n")
    assert old_transformers(["-m", "hf_rb.cli", "--help"]).returncode == 0
    program = "from hf_rb.integrations import optimum_cli; print(optimum_cli.REGISTER_COMMANDS)"
    pytest.importorskip("optimum.commands.base")
    assert old_transformers(["-c", program]).stdout == "[]\n"  # optimum's own commands go on


def test_a_removed_experimental_module_is_skipped(monkeypatch):
    monkeypatch.setitem(compat.TABLE, "GKDConfig", compat.Entry("trl.experimental.no_such_trainer", "GKDConfig"))
    with pytest.raises(Skipped, match="no trl.experimental.no_such_trainer; functions of hf_rb take its place"):
        check_parameters("GKDConfig")


def test_a_new_adapter_needs_the_peft_of_transformers(monkeypatch):
    monkeypatch.setattr(compat, "resolve", lambda name: "99.1")
    problem = compat.native_adapters_problem()
    assert re.fullmatch(r"transformers [\d.]+ takes adapters from peft 99.1 on; peft [\d.]+ is installed\.", problem)
    monkeypatch.setattr(compat, "resolve", lambda name: "0.1")
    assert compat.native_adapters_problem() is None


def test_a_moved_name_is_an_error_with_library_and_versions(monkeypatch):
    monkeypatch.setitem(compat.TABLE, "moved", compat.Entry("accelerate.utils", "no_such_function"))
    with pytest.raises(
        ImportError,
        match=r"`accelerate.utils.no_such_function`, which accelerate \d+\.\d+.* tested with accelerate 1\.",
    ):
        compat.moved  # noqa: B018


def test_a_moved_module_is_the_same_error(monkeypatch):
    monkeypatch.setitem(compat.TABLE, "moved", compat.Entry("accelerate.no_such_module", "function"))
    with pytest.raises(ImportError, match="tested with accelerate"):
        compat.resolve("moved")


def test_is_removed_of_a_module_that_is_there_is_false(monkeypatch):
    assert not compat.is_removed("GKDTrainer") and not compat.is_removed("GRPOTrainer._compute_loss")
    monkeypatch.setitem(compat.TABLE, "moved", compat.Entry("trl.experimental.gkd", "NoSuchTrainer"))
    monkeypatch.setitem(compat.TABLE, "gone", compat.Entry("trl.experimental.no_such_module", "Trainer"))
    assert not compat.is_removed("moved") and compat.is_removed("gone")
    with pytest.raises(ImportError, match="`trl.experimental.gkd.NoSuchTrainer`, which trl"):
        compat.resolve("moved")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(compat.TABLE, "absent", compat.Entry("no_such_library", "function"))
    with pytest.raises(ImportError, match="needs no_such_library for `absent`, and it is not installed"):
        compat.resolve("absent")


def test_what_a_library_lacks_itself_is_named(monkeypatch, tmp_path):
    (tmp_path / "accelerate_plugin.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(compat.TABLE, "absent", compat.Entry("accelerate_plugin", "function"))
    monkeypatch.setattr(versions.metadata, "version", lambda name: "1.0")
    with pytest.raises(ImportError, match="`accelerate_plugin.function`, and accelerate_plugin needs no_such_library"):
        compat.resolve("absent")


def test_a_name_outside_the_table_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        compat.nothing  # noqa: B018
