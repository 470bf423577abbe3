import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import hf_rb


def test_the_table_of_public_names_is_said_once():
    tree = ast.parse(Path(hf_rb.__file__).read_text())
    typed = {
        (alias.name, node.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    assert typed == set(hf_rb._MODULES.items())
    assert sorted(hf_rb._MODULES) == hf_rb.__all__


@pytest.mark.parametrize("name", hf_rb.__all__)
def test_every_public_name_resolves(name):
    assert getattr(hf_rb, name).__name__ == name
    assert name in dir(hf_rb)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SFTTrainr'"):
        hf_rb.SFTTrainr  # noqa: B018


def test_importing_is_fast_and_imports_no_heavy_library():
    # Processor time, because other processes may share the cores.
    program = "import sys, time; start = time.process_time(); import hf_rb; print(time.process_time() - start)"
    program += "; print(*{'torch', 'transformers', 'trl', 'peft', 'numpy'} & set(sys.modules))"
    outputs = [subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60) for _ in range(5)]
    assert all(output.split("\n")[1] == "" for output in outputs)
    assert statistics.median(float(output.split()[0]) for output in outputs) < 0.2


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(tmp_path):
    """Away from the source tree: the wheel brings its recipes, cards, schemas and models."""
    root, wheels, installed = Path(hf_rb.__file__).parents[1], tmp_path / "wheels", tmp_path / "installed"
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, root], check=True, timeout=300)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True, timeout=300)
    command = [sys.executable, "-m", "hf_rb.cli", "demo", "--problems", "8", "--max-steps", "2", "--output", "out"]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert str(installed) in result.stdout  # the recipe's path, as it is launched
    assert (tmp_path / "out" / "student-profit-ptqtp" / "README.md").is_file()
