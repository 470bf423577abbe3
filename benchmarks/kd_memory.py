"""Memory and CPU time of the distillation losses against their dense forms: `python benchmarks/kd_memory.py`.

One cell is one loss on N tokens, forward and backward, in a fresh process. Extra peak is the highest resident memory during the
call minus that before it; CPU is the process's own seconds over all threads, the median of the repeats. Ratios compare with the
dense form of the same objective in the same run. Writes `benchmarks/results/kd_memory.json` and `.md`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median


RESULTS = Path(__file__).parent / "results"
OBJECTIVES = ["forward_kl", "reverse_kl", "jsd", "akl", "hpd"]
PEERS = {"jsd": ["trl_dense", "trl_chunked", "liger"]}
CASES = [(512, "trained"), (128, "trained"), (128, "frozen")]


def _inputs(n: int, vocabulary: int, width: int, teacher_width: int, frozen: bool) -> dict:
    import torch

    torch.manual_seed(0)
    return {
        "hidden": torch.randn(n, width, requires_grad=True),
        "weight": (torch.randn(vocabulary, width) * 0.05).requires_grad_(not frozen),
        "teacher_hidden": torch.randn(n, teacher_width),
        "teacher_weight": torch.randn(vocabulary, teacher_width) * 0.1,
        "labels": torch.randint(0, vocabulary, (n,)),
        "uniforms": torch.rand(n),
    }


def _dense(objective: str, x: dict):
    import torch

    from hf_rb import objectives
    from hf_rb.objectives.hpd import inverse_cdf_sample

    student = x["hidden"] @ x["weight"].T
    with torch.no_grad():
        teacher = x["teacher_hidden"] @ x["teacher_weight"].T
    if objective == "hpd":
        samples = inverse_cdf_sample(student.detach().softmax(-1), x["uniforms"])
        return objectives.hpd_loss(student, teacher, x["labels"], samples).mean()
    if objective == "akl_parts":  # what akl is compared with in time: both divergences, no head
        return (objectives.forward_kl(student, teacher) + objectives.reverse_kl(student, teacher)).mean()
    function = {"akl": objectives.adaptive_kl}.get(objective) or getattr(objectives, objective)
    return function(student, teacher).mean()


def _tiled(objective: str, x: dict, monitor: bool = False):
    from hf_rb.methods.registry import find
    from hf_rb.objectives.hpd import HPD
    from hf_rb.ops.lm_head import Head, TeacherLogits, lm_head_loss

    rule = HPD(monitor=monitor) if objective == "hpd" else find("objective", objective).load()(monitor=monitor)
    tokens = {"labels": x["labels"], "uniforms": x["uniforms"]} if objective == "hpd" else {}
    weights = x["uniforms"].new_full((len(x["hidden"]),), 1 / len(x["hidden"]))
    teacher = [TeacherLogits(x["teacher_hidden"], Head(x["teacher_weight"]))]
    return lm_head_loss(x["hidden"], Head(x["weight"]), rule, tokens, teacher, weights).loss


def _trl_dense(x: dict):
    import torch
    from trl.experimental.gkd import GKDTrainer

    student = x["hidden"] @ x["weight"].T
    with torch.no_grad():
        teacher = x["teacher_hidden"] @ x["teacher_weight"].T
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels=x["labels"], beta=0.5)


def _trl_chunked(x: dict):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    heads = (x["hidden"], x["weight"], None, x["teacher_hidden"], x["teacher_weight"], None)
    return ChunkedDivergenceFunction.apply(*heads, 0.5, 1.0, 1.0, None, 1.0, None)[0].mean()


def _liger(x: dict):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    return loss(x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"], x["labels"])


def _peak_reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024


def run_cell(path: str, objective: str, n: int, frozen: bool, repeats: int, shape: tuple[int, int, int]) -> dict:
    """Runs one cell in this process. The first call is the one whose memory counts."""
    import torch

    x = _inputs(n, *shape, frozen)
    calls = {
        "dense": lambda: _dense(objective, x),
        "tiled": lambda: _tiled(objective, x),
        "monitored": lambda: _tiled(objective, x, monitor=True),
    }
    call = calls.get(path) or (lambda: globals()[f"_{path}"](x))
    small = _inputs(4, 64, *shape[1:], frozen)  # imports and pools are paid for before
    full, x = x, small
    call().backward()
    x = full
    seconds, extra = [], 0
    for repeat in range(repeats):
        for name in ("hidden", "weight"):
            x[name].grad = None
        _peak_reset()
        before, start = _status("VmRSS"), time.process_time()
        call().backward()
        seconds.append(time.process_time() - start)
        if repeat == 0:
            extra = _status("VmHWM") - before
    gradient = x["hidden"].grad
    return {"extra_peak": extra, "cpu": median(seconds), "spread": max(seconds) / min(seconds), "threads": torch.get_num_threads(),
            "grad_norm": float(gradient.norm()), "max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # fmt: skip


def _spawn(args: argparse.Namespace, path: str, objective: str, n: int, head: str) -> dict | None:
    command = [sys.executable, __file__, "--cell", path, objective, str(n), head, "--repeats", str(args.repeats)]
    command += ["--shape", *map(str, args.shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  {path} {objective}: not measured ({done.stderr.strip().splitlines()[-1]})")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(151_936, 256, 512), metavar=("V", "H", "H_TEACHER"))
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        path, objective, n, head = args.cell
        print(json.dumps(run_cell(path, objective, int(n), head == "frozen", args.repeats, tuple(args.shape))))
        return
    cells = []
    for n, head in CASES:
        for objective in args.objectives:
            paths = ["dense", "tiled", *(["monitored"] if n == 512 else []), *(PEERS.get(objective, []) if head == "trained" else [])]  # fmt: skip
            for path in paths:
                cell = _spawn(args, path, objective, n, head)
                if cell:
                    cells.append({"tokens": n, "head": head, "objective": objective, "path": path, **cell})
                    print(f"{n:4d} {head:8} {objective:11} {path:12} {cell['extra_peak'] / 2**20:8.0f} MiB {cell['cpu']:7.2f} s", flush=True)  # fmt: skip
        if "akl" in args.objectives and head == "trained":
            cell = _spawn(args, "dense", "akl_parts", n, head)
            cells.append({"tokens": n, "head": head, "objective": "akl_parts", "path": "dense", **cell})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kd_memory.json").write_text(json.dumps({"shape": list(args.shape), "cells": cells}, indent=2) + "\n")
    table = render(cells, tuple(args.shape))
    (RESULTS / "kd_memory.md").write_text(table)
    print("\n" + table)


def render(cells: list[dict], shape: tuple[int, int, int]) -> str:
    """Returns the Markdown tables: every bar with what was measured, then all cells."""
    bars = [
        f"| {what} | {value:.2f} | {bar:.2f} | {'met' if value <= bar else '**missed**'} |"
        for what, value, bar in _bars(cells, shape)
    ]
    lines = [
        "# Memory and CPU time of the distillation losses",
        "",
        f"Vocabulary {shape[0]:,}, hidden size {shape[1]} (student) and {shape[2]} (teacher), float32, forward and backward, a fresh process a cell.",
        "`tiled` is without the divergences and the entropy that the trainers also log, `monitored` with them.",
        "`python benchmarks/kd_memory.py` repeats it.",
        "",
        "| bar | measured | at most | |",
        "|---|---:|---:|---|",
        *bars,
        "",
        "Ratios compare with the dense form of the same objective.",
        "",
        "| tokens | head | objective | path | extra peak MiB | ratio | CPU s | ratio |",
        "|---:|---|---|---|---:|---:|---:|---:|",
    ]
    dense = {(c["tokens"], c["head"], c["objective"]): c for c in cells if c["path"] == "dense"}
    for c in cells:
        base = dense.get((c["tokens"], c["head"], c["objective"]), c)
        memory, cpu = c["extra_peak"] / base["extra_peak"], c["cpu"] / base["cpu"]
        lines.append(
            f"| {c['tokens']} | {c['head']} | {c['objective']} | {c['path']} | {c['extra_peak'] / 2**20:.0f} | {memory:.2f} | {c['cpu']:.2f} | {cpu:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _bars(cells: list[dict], shape: tuple[int, int, int]) -> Iterator[tuple[str, float, float]]:
    """Yields (what, measured, highest allowed) for every bar whose cells are there."""
    found = {(c["tokens"], c["head"], c["objective"], c["path"]): c for c in cells}
    head_gradient = 4 * shape[0] * shape[1]
    for (n, head, objective, path), c in found.items():
        if path != "tiled":
            continue
        dense = found[n, head, objective, "dense"]
        name = f"{objective}, N = {n}" + (", head frozen" if head == "frozen" else "")
        memory, cpu = c["extra_peak"] / dense["extra_peak"], c["cpu"] / dense["cpu"]
        if n == 512:
            yield f"{name}: extra peak / dense", memory, 1 / 8 if objective in ("jsd", "akl") else 1 / 5
        elif head == "frozen":
            yield f"{name}: extra peak / dense", memory, 1 / 5
        else:
            allowed = 2 * head_gradient + (64 << 20)
            yield f"{name}: extra peak / (2 x head gradient + 64 MiB)", c["extra_peak"] / allowed, 1.0
        if head == "trained" and objective == "akl":
            parts = found[n, head, "akl_parts", "dense"]
            yield f"{name}: CPU / dense forward_kl + reverse_kl", c["cpu"] / parts["cpu"], 1.5
        elif head == "trained":
            yield f"{name}: CPU / dense", cpu, 1.05 if n == 512 else 1.1
        forward = found.get((n, head, "forward_kl", "tiled"))
        if head == "trained" and objective == "hpd" and forward:
            yield f"{name}: CPU / our forward_kl", c["cpu"] / forward["cpu"], 1.1 if n == 512 else 1.2


if __name__ == "__main__":
    main()
