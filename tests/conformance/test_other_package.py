"""An objective and a shaper of the package in `tests/example_package` pass the suite without a line of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.example_package import FOLDER, installed
from helpers.seeded_runs import python_path


@pytest.mark.slow
def test_methods_of_another_package_pass_the_suite(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    command += ["-m", "not slow", "-k", "squared or halve or documented"]
    with installed(tmp_path):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(FOLDER), python_path()])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80
