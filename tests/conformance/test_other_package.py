"""Methods of another package pass the suite without a line of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.plugins import install
from helpers.seeded_runs import python_path


EXAMPLE = Path(__file__).parent / "example_package" / "example_methods.py"


@pytest.mark.slow
def test_methods_of_another_package_pass_the_suite(monkeypatch, tmp_path):
    points = {"objective": {"squared": "Squared"}, "shaper": {"halve": "Halve"}}
    install(monkeypatch, tmp_path / "installed", "example-methods", EXAMPLE.read_text(encoding="utf-8"), **points)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    command += [str(Path(__file__).parent), "-m", "not slow", "-k", "squared or halve or documented"]
    path = os.pathsep.join([str(tmp_path / "installed"), python_path()])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80
