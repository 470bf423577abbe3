"""Jobs in forks that are killed at random moments and then run again. Started by `test_kills.py`, with `tests` on the path.

    python -m helpers.killed_jobs FOLDER KILLS

Every job runs once whole, then until KILLS forks of it were killed: with SIGKILL, after a random share of the time that a run takes. What they
left is looked at, and another fork runs the job to its end in the same folder. What was seen is printed as JSON.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from helpers.random_models import save_qwen3
from hf_rb import PTQTPConfig, SFTConfig, SFTTrainer, tiny
from hf_rb.io.files import verify_manifest
from hf_rb.quantizers.folders import stream as streaming
from hf_rb.teachers import LocalTeacher
from hf_rb.teachers.cache_format import Manifest
from hf_rb.teachers.capture import cache_teacher
from hf_rb.weights import interpolate


class Job(NamedTuple):
    """`run(folder)` does the job; `complete(folder)` lists what in the folder claims to be whole."""

    run: Callable[[Path], None]
    complete: Callable[[Path], list[Path]]


def digest(path: Path) -> dict[str, str]:
    """The tensors of a folder's files by their contents."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                data = tensors.get_tensor(name).reshape(-1).view(torch.uint8)
                found[f"{file.name}:{name}"] = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    return found


def fork(job: Job, folder: Path, after: float | None = None) -> int:
    """Runs a job in a child, which is killed after that many seconds; returns its exit code (negative: the signal)."""
    child = os.fork()
    if not child:
        status = 1
        try:
            job.run(folder)
            status = 0
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_jobs(folder: Path) -> dict[str, Job]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    one, other = (str(save_qwen3(folder / f"model-{seed}", seed, **sizes)) for seed in (0, 1))
    settings = dict(
        use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=4, max_length=96, max_steps=3,
        save_strategy="steps", save_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = tiny.load_dataset("math", config="prompt_completion", size=12)

    def trainer(run: Path) -> SFTTrainer:
        return SFTTrainer(one, SFTConfig(str(run), **settings), train_dataset=data)

    capturing = trainer(folder / "unused")
    capturing.teacher = LocalTeacher(other)
    capturing.teacher.prepare(capturing)

    def quantizing(run: Path) -> None:
        streaming.quantize_checkpoint(
            one, run / "model", PTQTPConfig(), progress=False, overwrite=(run / "model").exists()
        )

    def merging(run: Path) -> None:
        interpolate(
            one, other, run / "model", 0.3, files_from="start", progress=False, overwrite=(run / "model").exists()
        )

    def caching(run: Path) -> None:
        cache_teacher(capturing, run / "cache", k=8, dtype="float32", shard_tokens=100, batch_tokens=200)

    def saving(run: Path) -> None:
        found = trainer(run / "training")
        whole = [path for path in (run / "training").glob("checkpoint-*") if not verify_manifest(path)]
        found.train(resume_from_checkpoint=True if whole else None)

    def model(run: Path) -> list[Path]:
        return [run / "model"] if (run / "model").exists() else []

    def shards(run: Path) -> list[Path]:
        """A whole cache; of an unfinished one, the shards that its manifest names are compared with their checksums."""
        if not (run / "cache" / "manifest.json").exists():
            return []
        manifest = Manifest.read(run / "cache")
        for number, shard in manifest.shards.items():
            data = (run / "cache" / f"shard-{number:05d}.safetensors").read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard.sha256
        return [run / "cache"] if manifest.is_complete else []

    def checkpoints(run: Path) -> list[Path]:
        return [path for path in sorted((run / "training").glob("checkpoint-*")) if not verify_manifest(path)]

    return {
        "quantizing": Job(quantizing, model),
        "merging": Job(merging, model),
        "caching": Job(caching, shards),
        "saving": Job(saving, checkpoints),
    }


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # tqdm's own lock is shared by all forks, and one that dies with it stops the others for good
    chance, seen = random.Random(0), {}
    for name, job in make_jobs(folder).items():
        fork(job, folder / name / "warm")
        start = time.perf_counter()
        assert fork(job, folder / name / "whole") == 0
        seconds = time.perf_counter() - start
        expected = {path.name: digest(path) for path in job.complete(folder / name / "whole")}
        runs = []
        while sum(run["killed"] < 0 for run in runs) < kills and len(runs) < 3 * kills:
            run = folder / name / str(len(runs))
            moment = chance.random() * seconds
            code = fork(job, run, after=moment)
            seconds = min(seconds, moment) if code == 0 else seconds  # the machine has become faster
            left = {path.name: digest(path) == expected[path.name] for path in job.complete(run)}
            for path in job.complete(run):
                if name != "caching":
                    AutoModelForCausalLM.from_pretrained(path)
            again = fork(job, run)
            after = {path.name: digest(path) for path in job.complete(run)}
            hidden = [path.name for path in run.iterdir() if path.name.startswith(".")]
            runs.append({"killed": code, "whole": left, "again": again, "same": after == expected, "hidden": hidden})
        seen[name] = {"expected": sorted(expected), "tensors": sum(map(len, expected.values())), "runs": runs}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
