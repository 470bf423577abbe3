import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers.seeded_runs import python_path


CASES = ("sft_cases", "gkd_cases", "distillation_cases", "grpo_cases", "head_cases")


@pytest.fixture(scope="session")
def in_two_processes(request, tmp_path_factory):
    """
    Returns what a file of cases finds in two processes. One launch runs those of all selected tests; under xdist the first worker
    launches it for both.
    """
    tests = [item.path.stem for item in request.session.items if "in_two_processes" in item.fixturenames]
    names = [name for name in CASES if f"test_{name.removesuffix('_cases')}_equivalence" in tests]
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "two_processes"
    with FileLock(f"{shared}.lock"):
        if not (shared / f"{names[-1]}.pt").exists():
            for name in names:
                import_module(name).save_models(shared / name)
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            script = Path(__file__).with_name("two_processes.py")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
            subprocess.run([*launch, script, shared, *names], check=True, timeout=500, env=environment)
    return lambda name: torch.load(shared / f"{name}.pt")
