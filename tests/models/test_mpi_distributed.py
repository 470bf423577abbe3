import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes(make_mixture, tmp_path):
    """DDP and FSDP2 equal one process; tensor and expert parallelism, run for real, are refused."""
    make_mixture("mpi_qwen3_moe").save_pretrained(tmp_path / "mpi")
    make_mixture("qwen3_moe").save_pretrained(tmp_path / "native")
    worker = Path(__file__).with_name("mpi_distributed_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*launch, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
