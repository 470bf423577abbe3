import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from all_rows import TRAINERS
from filelock import FileLock
from helpers.seeded_runs import Runs, python_path


SPLIT = "test_split_of_a_step_does_not_change_training"
EXTRAS = {"head_cases": "test_odd_heads", "resume_cases": "test_trainers"}


@pytest.fixture(scope="session")
def trainers(tmp_path_factory):
    """The descriptions of all trainers, with their models."""
    for name, one in TRAINERS.items():
        one.models = tmp_path_factory.mktemp(name)
        one.save_models(one.models)
    return TRAINERS


@pytest.fixture(scope="session")
def whole(trainers):
    """Every row in one process and one padded batch, by the names of trainer and row."""
    return Runs(lambda key: trainers[key[0]].train_row(trainers[key[0]].rows[key[1]], card=True))


@pytest.fixture(scope="session")
def in_two_processes(request, trainers, tmp_path_factory):
    """
    Returns what two processes find, of the selected tests: trained rows by (trainer, row, split, path), and modules of cases by name. One
    launch runs all; under xdist the first worker launches it for both.
    """
    items = request.session.items
    keys = [item.callspec.params["key"] for item in items if item.originalname == SPLIT]
    rows = [key for key in keys if "2 processes" in key[2]]
    files = {item.path.stem for item in items if "in_two_processes" in item.fixturenames}
    extras = [name for name, file in EXTRAS.items() if file in files]
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "two_processes"
    with FileLock(f"{shared}.lock"):
        if not (shared / "found.pt").exists():
            shared.mkdir()
            for name in extras:
                import_module(name).save_models(shared / name)
            folders = {name: str(one.models) for name, one in trainers.items()}
            (shared / "plan.pickle").write_bytes(pickle.dumps((folders, rows, extras)))
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            script = Path(__file__).with_name("two_processes.py")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
            subprocess.run([*launch, script, shared], check=True, timeout=900, env=environment)
    return torch.load(shared / "found.pt").__getitem__
