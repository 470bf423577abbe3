"""A kill at any moment loses nothing that was whole and leaves nothing half-written that loads."""

import json
import os
import subprocess
import sys

import pytest
from helpers.seeded_runs import python_path


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path, kills):
    arguments = [sys.executable, "-m", "helpers.killed_jobs", tmp_path, str(kills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen.keys() == {"quantizing", "merging", "caching", "saving"}
    for job, found in seen.items():
        assert found["tensors"] > 0
        assert sum(run["killed"] == -9 for run in found["runs"]) == kills, (job, found)
        for run in found["runs"]:
            assert all(run["whole"].values()), (job, run)  # what claims to be whole is
            assert run["again"] == 0 and run["same"] and not run["hidden"], (job, run)
    left = [len(run["whole"]) for run in seen["saving"]["runs"]]
    assert kills < 20 or len(set(left)) > 1  # some were killed between two checkpoints
