"""Runs `quantize_checkpoint` in forks that are killed, and says what came of it. Started by `test_streaming.py`.

    python streaming_worker.py SMALL LARGE OUT

SMALL is quantized again and again: one fork kills itself with SIGKILL at one of the calls that change or sync a file, the next
one goes on and ends. LARGE is quantized once, and the growth of the memory is measured. The results are printed as JSON.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from hf_rb import PTQTPConfig
from hf_rb.quantizers.folders import stream as streaming
from hf_rb.quantizers.ptqtp import PTQTPQuantizer


CALLS = ("replace", "fsync", "unlink", "rmdir")
POINTS, DELAYS = 12, (0.05, 0.1, 0.2)


def fork(work, *args) -> tuple[int, str]:
    """Runs `work(*args)` in a child; returns its exit code (negative: the signal) and the JSON it returned."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(write, json.dumps(work(*args)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def run(source: Path, destination: Path, kill_at: int | None = None) -> dict:
    """Quantizes, dying before or after a call that touches the disk; returns how many there are and what was solved."""
    points, solved = 0, []

    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal points
            for action in (lambda: None, lambda: call(*args, **kwargs)):
                result = action()
                points += 1
                if points == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    quantize_tensor = PTQTPQuantizer.quantize_tensor
    PTQTPQuantizer.quantize_tensor = lambda self, name, *args: (
        solved.append(name) or quantize_tensor(self, name, *args)
    )
    streaming.PART = 1 << 15
    try:
        report = streaming.quantize_checkpoint(source, destination, PTQTPConfig(), progress=False)
    except FileExistsError as error:
        return {"points": points, "solved": solved, "exists": str(error)}
    return {"points": points, "solved": solved, "layers": len(report.layers), "file_bytes": report.file_bytes}


def killed_by_parent(source: Path, destination: Path, delay: float) -> int:
    child = os.fork()
    if not child:
        try:
            run(source, destination)
        finally:
            os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def resumed(source: Path, destination: Path, killed: int) -> dict:
    """What a second run into the same folder does."""
    result = {"name": destination.name, "killed": killed, "published": destination.exists()}
    code, text = fork(run, source, destination)
    return result | {"code": code} | json.loads(text or "{}")


def peak_memory(small: Path, large: Path, out: Path) -> dict:
    """Growth of the resident memory in bytes by the large checkpoint, over a run on the small one."""
    streaming.quantize_checkpoint(small, out / "warm", PTQTPConfig(), progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    streaming.PART = 1 << 23
    streaming.quantize_checkpoint(large, out / "large", PTQTPConfig(), progress=False)
    return {"growth": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def main() -> None:
    small, large, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    memory = json.loads(fork(peak_memory, small, large, out)[1])
    whole = json.loads(fork(run, small, out / "whole")[1])
    step = max(1, whole["points"] // POINTS)
    runs = []
    for point in range(1, whole["points"] + 1, step):
        destination = out / f"point-{point}"
        runs.append(resumed(small, destination, fork(run, small, destination, point)[0]))
    for delay in DELAYS:
        destination = out / f"delay-{delay}"
        runs.append(resumed(small, destination, killed_by_parent(small, destination, delay)))
    print(json.dumps({"whole": whole, "runs": runs} | memory))


if __name__ == "__main__":
    main()
