import ast
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
