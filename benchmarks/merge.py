"""Interpolating a model: hf-rb merge against mergekit's `linear`, in time, memory and values.

    python benchmarks/merge.py MODEL_FOLDER --mergekit FOLDER

writes `benchmarks/results/merge.json` and the table `merge.md` beside it. The second model is the first one with noise of a
hundredth of every tensor's standard deviation, in the first one's type. mergekit is not a dependency: install it into a folder of its own
(`pip install --no-deps --target FOLDER mergekit immutables scipy sentencepiece protobuf`) and name that. Every cell is a process of its
own, run several times in turn; times are those of the processor (all threads) and by the clock, memory is the peak of the process's
resident set. Each tool reads both models and writes one, tokenizer and all.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any


RESULTS = Path(__file__).parent / "results"
LAMBDA = 0.3
CONFIG = """merge_method: linear
models:
  - {{model: {start}, parameters: {{weight: {keep}}}}}
  - {{model: {end}, parameters: {{weight: {lam}}}}}
dtype: {dtype}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model in 16 bits")
    parser.add_argument("--mergekit", type=Path, help="folder into which mergekit was installed")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        result = compare(args, Path(scratch))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "merge.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "merge.md").write_text(render(result), encoding="utf-8")
    print(render(result))


def compare(args: argparse.Namespace, scratch: Path) -> dict:
    model, noisy = args.model.resolve(), scratch / "noisy"
    # In a process of its own: what this one has held would count as memory of its children.
    largest = aside(make_noisy, model, noisy)
    ours = [sys.executable, "-m", "hf_rb.cli", "merge", "--method"]
    linear = [*ours, "linear", "--overwrite", "--start", model, "--end"]
    cells = {
        "import torch": ([sys.executable, "-c", "import torch"], {}),
        "hf-rb merge, with itself": ([*linear, model, scratch / "self"], {}),
        "hf-rb merge, linear": ([*linear, noisy, "--lambda", LAMBDA, scratch / "ours"], {}),
        "hf-rb merge, linear, 4 lambdas": ([*linear, noisy, "--lambda", "0.2,0.4,0.6,0.8", scratch / "sweep"], {}),
        "hf-rb merge, graft": (
            [*ours, "graft", "--overwrite", "--base", model, "--tuned", noisy, "--onto", model, scratch / "graft"],
            {},
        ),
        "hf-rb merge, timber": (
            [*ours, "timber", "--overwrite", "--base", model, "--model", noisy, scratch / "timber"],
            {},
        ),
    }
    if args.mergekit:
        config = scratch / "config.yaml"
        dtype = json.loads((model / "config.json").read_text()).get("dtype", "bfloat16")
        config.write_text(CONFIG.format(start=model, end=noisy, keep=1 - LAMBDA, lam=LAMBDA, dtype=dtype))
        command = [sys.executable, "-m", "mergekit.scripts.run_yaml", config, scratch / "theirs"]
        path = {"PYTHONPATH": str(args.mergekit)}
        cells["mergekit, linear"] = (command, path)
        cells["mergekit, linear, --lazy-unpickle --low-cpu-memory"] = (
            [*command, "--lazy-unpickle", "--low-cpu-memory"],
            path,
        )
    runs = {name: [] for name in cells}
    for _ in range(args.repeats):
        for name, (command, environment) in cells.items():
            runs[name].append(measure(command, environment))
            print(name, runs[name][-1], flush=True)
    result = {"model": model.name, "largest_tensor": largest, "repeats": args.repeats, "rows": []}
    for name, cell in runs.items():
        row = {key: median(run[key] for run in cell) for key in cell[0]}
        times = [run["processor_s"] for run in cell]
        result["rows"].append({"name": name, "spread": (max(times) - min(times)) / row["processor_s"], **row})
    if args.mergekit:
        results = {"hf-rb": scratch / "ours", "mergekit": scratch / "theirs"}
        result["against_mergekit"] = aside(differences, model, noisy, results)
    result["environment"] = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    return result


def aside(function: Callable, *args: Any) -> Any:
    """Calls a function in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def make_noisy(model: Path, folder: Path) -> int:
    """Writes the second model and returns the bytes of the largest tensor."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    generator, largest = torch.Generator().manual_seed(0), 0
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() / 100
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
            largest = max(largest, tensor.nbytes)
        save_file(tensors, file, {"format": "pt"})
    return largest


def measure(command: list, environment: dict[str, str]) -> dict[str, float]:
    """Runs a command in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    started = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    stderr = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(stderr.decode())
    return {
        "clock_s": time.monotonic() - started,
        "processor_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def differences(start: Path, end: Path, results: dict[str, Path]) -> dict[str, dict[str, float]]:
    """
    How far results are from the exact values and from each other: values that are not the exact one rounded once, and the
    largest distance between two results in steps that the type has at the larger of the two values merged.
    """
    import torch

    from hf_rb.io.safetensors import Checkpoint

    ends = [Checkpoint(folder).entries for folder in (start, end)]
    merged = [Checkpoint(folder).entries for folder in results.values()]
    found, largest, apart, values = dict.fromkeys(results, 0), 0.0, 0, 0
    for name, entry in ends[0].items():
        one, other = (entries[name].read().double() for entries in ends)
        exact = ((1 - LAMBDA) * one + LAMBDA * other).to(entry.dtype)
        tensors = [entries[name].read() for entries in merged]
        for key, tensor in zip(results, tensors, strict=True):
            found[key] += (tensor != exact).sum().item()
        distance = (tensors[0].double() - tensors[-1].double()).abs()
        step = torch.finfo(entry.dtype).eps * 2.0 ** torch.maximum(one.abs(), other.abs()).log2().floor()
        apart += (distance > 0).sum().item()
        largest = max(largest, torch.where(distance > 0, distance / step, 0).max().item())
        values += exact.numel()
    return {"values": values, "not_exact": found, "apart": apart, "largest_distance_in_steps": largest}


def render(result: dict) -> str:
    lines = [
        f"{result['model']}, one thread, medians of {result['repeats']} runs. The bar for memory is three times the largest tensor and 200 MB: "
        f"{3 * result['largest_tensor'] / 1e6 + 200:.0f} MB.",
        "",
        "| | processor time, s | by the clock, s | peak memory, MB |",
        "|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['name']} | {row['processor_s']:.1f} ±{row['spread'] / 2:.0%} | {row['clock_s']:.1f} | {row['peak_mb']:.0f} |"
        )
    if found := result.get("against_mergekit"):
        wrong = found["not_exact"]
        lines += [
            "",
            f"Of {found['values']:,} values hf-rb writes {wrong['hf-rb']:,} and mergekit {wrong['mergekit']:,} other than the exact one rounded "
            f"once. The two differ in {found['apart']:,}, by at most {found['largest_distance_in_steps']:.2g} of the step that bfloat16 has at "
            "the larger of the two values merged.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
