import importlib
import json
import os
import py_compile
import re
import statistics
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest

import hf_rb
from hf_rb.utils import lazy


PACKAGE = Path(hf_rb.__file__).parent
LAZY = ("", ".quantizers", ".quantizers.ptqtp", ".quantizers.d2quant", ".weights", ".recover")


@pytest.mark.parametrize("package", LAZY)
def test_a_lazy_package_exports_its_imports_for_type_checkers(package):
    module = importlib.import_module(f"hf_rb{package}")
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    assert sorted(lazy._imports(module)) == sorted(module.__all__)


@pytest.mark.parametrize("name", hf_rb.__all__)
def test_every_public_name_resolves(name):
    assert getattr(hf_rb, name).__name__ == name
    assert name in dir(hf_rb)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SFTTrainr'") as error:
        hf_rb.SFTTrainr  # noqa: B018
    assert (error.value.name, error.value.obj) == ("SFTTrainr", hf_rb)  # for Python's "Did you mean"


def test_packages_need_no_import_of_their_own():
    program = "import hf_rb; print(hf_rb.tiny.resolve('tiny:student'), hf_rb.evaluation.exact_match)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
    assert all((Path(hf_rb.__file__).parent / name / "__init__.py").is_file() for name in hf_rb._PACKAGES)


def test_importing_is_fast_and_imports_no_heavy_library():
    # Processor time, because other processes may share the cores.
    program = "import sys, time; start = time.process_time(); import hf_rb; print(time.process_time() - start)"
    program += "; print(*{'torch', 'transformers', 'trl', 'peft', 'numpy'} & set(sys.modules))"
    outputs = [subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60) for _ in range(5)]
    assert all(output.split("\n")[1] == "" for output in outputs)
    assert statistics.median(float(output.split()[0]) for output in outputs) < 0.2


def import_from(path):
    """What a new process says to an import of the package from this place."""
    program = "import sys, hf_rb; print(hf_rb.__file__, *{*hf_rb.__all__} - {*dir(hf_rb)}, {'torch', 'transformers'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=60)


def test_importing_works_from_a_zip_archive(tmp_path):
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in PACKAGE.rglob("*.py"):
            file.write(path, path.relative_to(PACKAGE.parent))
    result = import_from(archive)
    assert result.stderr == "" and result.stdout == f"{archive / 'hf_rb/__init__.py'} set()\n"


def test_importing_without_sources_says_so(tmp_path):
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("__init__.py", "methods", "utils", "integrations"):
            target = tmp_path / "packages" / path.relative_to(PACKAGE.parent).with_suffix(".pyc")
            py_compile.compile(str(path), cfile=str(target), doraise=True)
    result = import_from(tmp_path / "packages")
    assert result.stderr.splitlines()[-1] == (
        "ImportError: hf_rb reads its public names from its source, and is installed as bytecode alone: install hf_rb with its .py files."
    )


SHIMS = {
    "agents": "rl.agents",
    "agents.rewards": "rl.agents.rewards",
    "agents.search": "rl.agents.search",
    "judges": "rl.judges",
    "rewards": "rl.rewards",
    "trainers.token_samples": "trainers.common.token_samples",
}


@pytest.mark.parametrize("name", SHIMS)
def test_a_public_module_hands_on_all_names_of_its_own(name):
    public, own = (importlib.import_module(f"hf_rb.{one}") for one in (name, SHIMS[name]))
    assert public.__all__ == own.__all__
    assert all(getattr(public, one) is getattr(own, one) for one in own.__all__)


HEAVY = {"torch", "transformers", "trl", "math_verify"}


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("hf_rb.rewards, hf_rb.agents.rewards, hf_rb.agents.search", HEAVY),
        ("hf_rb.judges", HEAVY - {"torch"}),  # which the shapers' package imports
    ],
)
def test_importing_a_public_module_of_rl_is_light(modules, heavy):
    program = f"import sys, {modules}; print(*{heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60) == "\n"


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "model_cards").glob("*.md")]
# Names that README and cards had before modules went into folders.
EARLIER = (
    "hf_rb.agents.rewards.search_f1",
    "hf_rb.agents.search.search_environment",
    "hf_rb.judges.Judge",
    "hf_rb.rewards.REWARDS",
    "hf_rb.trainers.token_samples.add_token_samples",
)
NO_MODULE = "hf_rb.shapers"  # a group of entry points


def test_every_dotted_name_of_readme_and_cards_is_there():
    named = {one for page in PAGES for one in re.findall(r"\bhf_rb(?:\.\w+)+", page.read_text(encoding="utf-8"))}
    assert {"hf_rb.weights", EARLIER[-1]} < named
    for name in sorted(named.union(EARLIER) - {NO_MODULE}):
        place, rest = name, []
        while not is_module(place):
            place, _, last = place.rpartition(".")
            rest.insert(0, last)
        value = importlib.import_module(place)
        for attribute in rest:
            value = getattr(value, attribute)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return (path / "__init__.py").is_file() or path.with_suffix(".py").is_file()


PIP = [sys.executable, "-m", "pip"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    root, wheels = Path(hf_rb.__file__).parents[1], tmp_path_factory.mktemp("wheels")
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", wheels, root], check=True, timeout=300)
    return next(wheels.iterdir())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "--no-deps", "--target", target, wheel], check=True, timeout=300)
    return target


def run_installed(installed, module, *arguments, cwd):
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(installed, tmp_path):
    """Away from the source tree: the wheel brings its recipes, cards, schemas and models."""
    arguments = ["demo", "--problems", "8", "--max-steps", "2", "--output", "out"]
    result = run_installed(installed, "hf_rb.cli", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert str(installed) in result.stdout  # the recipe's path, as it is launched
    assert (tmp_path / "out" / "student-profit-ptqtp" / "README.md").is_file()


@pytest.mark.slow
def test_optimum_finds_our_commands_in_the_wheel(installed, tmp_path):
    """The test's own installation may have the same file. Then it runs that one: two of them would be two commands of one name."""
    pytest.importorskip("optimum.commands.base")
    register = Path("optimum", "commands", "register", "register_hf_rb.py")
    packed = (installed / register).read_text(encoding="utf-8")
    assert packed == Path(hf_rb.__file__).with_name("integrations").joinpath("optimum_cli.py").read_text(
        encoding="utf-8"
    )
    here = Path(importlib.import_module("optimum.commands.base").__file__).parents[2]
    there = tmp_path if (here / register).is_file() else installed
    optimum_cli = partial(run_installed, there, "optimum.commands.optimum_cli", cwd=tmp_path)
    assert "ptqtp" in (shown := optimum_cli("--help").stdout) and "d2quant" in shown
    assert "--planes" in (shown := optimum_cli("ptqtp", "--help").stdout) and "--bits" not in shown
    result = optimum_cli("ptqtp", "tiny:student", "out", "--packing", "nibble")
    assert result.returncode == 0 and "Saved in out." in result.stdout, result.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["packing"] == "nibble"
    wrong = optimum_cli("d2quant", "tiny:student", "other")
    assert wrong.returncode == 2 and "ptqtp" not in wrong.stderr and "dataset" in wrong.stderr


@pytest.mark.slow
def test_the_wheel_brings_the_optimum_that_its_file_pretends(wheel, tmp_path):
    """Into an environment with everything but optimum: our file in its namespace makes transformers believe that it is there."""
    libraries, environment = tmp_path / "libraries", tmp_path / "environment"
    libraries.mkdir()
    for folder in (Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
        for entry in folder.iterdir():
            if not entry.name.startswith(("optimum", "hf_rb", "__editable__")) and entry.suffix != ".pth":
                if not (libraries / entry.name).exists():
                    (libraries / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=120)
    python = environment / "bin" / "python"
    own = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(own.strip(), "libraries.pth").write_text(f"{libraries}\n")
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command):
        return subprocess.run(
            [python, *command], cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=300
        )

    available = "from transformers.utils import is_optimum_available; print(is_optimum_available())"
    assert run("-c", available).stdout == "False\n"
    install = subprocess.run([*PIP, "--python", python, "install", wheel], capture_output=True, text=True, timeout=300)
    if "No matching distribution found for optimum" in install.stderr:
        pytest.skip("No package index can be reached.")
    assert install.returncode == 0, install.stderr[-2000:]
    assert "optimum-" in install.stdout.rpartition("Successfully installed")[2]
    loaded = run("-c", f"{available}; import optimum.gptq.data as data; print(data.get_dataset.__name__)")
    assert loaded.stdout == "True\nget_dataset\n", loaded.stderr[-2000:]
    shown = run("-m", "optimum.commands.optimum_cli", "--help").stdout
    assert "ptqtp" in shown and "d2quant" in shown
