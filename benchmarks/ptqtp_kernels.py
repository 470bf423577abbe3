"""How fast a quantized layer multiplies, against the faster of `F.linear` in bfloat16 and in float32.

    python benchmarks/ptqtp_kernels.py [--threads 1]

writes `benchmarks/results/ptqtp_kernels.json` and the tables `ptqtp_kernels.md` beside it.

Weights are taken in turn from copies of more than 256 MB, so that none is in a cache. All contestants of a shape run in
turns; medians. One thread is timed in processor time, which other work on the machine changes little, more threads by the clock.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from hf_rb.io import native
from hf_rb.quantizers import kernels
from hf_rb.quantizers.kernels import cpu
from hf_rb.quantizers.ptqtp.format import layout_of


RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 128
BYTES = 1 << 28  # of the copies of a weight
TIME = 4.0  # seconds for the contestants of a shape

# Model, name of the projection, (out_features, in_features), bar for the exact kernel.
DECODE = [
    ("", "4096 x 4096", (4096, 4096), 2.5),
    ("Qwen3-0.6B", "q", (2048, 1024), 1.3),
    ("Qwen3-0.6B", "k, v", (1024, 1024), 1.3),
    ("Qwen3-0.6B", "o", (1024, 2048), 1.3),
    ("Qwen3-0.6B", "gate, up", (3072, 1024), 1.3),
    ("Qwen3-0.6B", "down", (1024, 3072), 1.3),
    ("SmolLM2-135M", "q, o", (576, 576), 1.0),
    ("SmolLM2-135M", "k, v", (192, 576), 1.0),
    ("SmolLM2-135M", "gate, up", (1536, 576), 1.0),
    ("SmolLM2-135M", "down", (576, 1536), 1.0),
]
INT8_BAR = 3.5  # 4096 x 4096
BATCHES = [1, 2, 4, 8, 16, 64, 256]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {"environment": environment(args.threads)}
    with torch.inference_mode():
        result["decode"] = [decode(*row, args.threads, result["environment"]) for row in DECODE]
        result["batches"] = [row for shape in ((4096, 4096), (3072, 1024)) for row in batches(shape, args.threads)]
    result["bars"] = bars(result["decode"])
    write("ptqtp_kernels", result, render(result))


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": native.variant(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "gigabytes_per_second": bandwidth(threads) / 1e9,
    }


def write(name: str, result: dict[str, Any], text: str) -> None:
    """Writes the figures and their table; those of several threads beside those of one."""
    threads = result["environment"]["threads"]
    name = name if threads == 1 else f"{name}_{threads}_threads"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def bandwidth(threads: int) -> float:
    """Bytes a second that a sum over 512 MB reads, the best of ten."""
    numbers = torch.ones(1 << 27)
    return max(numbers.nbytes / clock(numbers.sum, threads) for _ in range(10))


def clock(call: Callable, threads: int, times: int = 1) -> float:
    """Seconds of one call."""
    now = time.thread_time if threads == 1 else time.perf_counter
    start = now()
    for _ in range(times):
        call()
    return (now() - start) / times


def copies(bytes_each: int, make: Callable) -> Callable:
    """Returns what gives a function one of many copies, each time another; every function begins at another place."""
    many = [make() for _ in range(BYTES // bytes_each + 2)]

    def rotate(function: Callable, start: float = 0.0) -> Callable:
        turn = count(int(start * len(many)))
        return lambda: function(many[next(turn) % len(many)])

    return rotate


def contestants(shape: tuple[int, int], m: int) -> dict[str, Callable]:
    """What multiplies `m` activations by a matrix of this shape."""
    out, width = shape
    layout = layout_of(width, GROUP_SIZE, planes=2)
    x = torch.randn(m, width)
    xb = x.bfloat16()
    packed = torch.randint(0, 9, (out, layout.row_bytes), dtype=torch.uint8) * 17
    scale = (torch.rand(out, layout.groups, 2) * 0.02).half()
    # Exactly three to one in float16, as the solver leaves them: 8 bits of a bfloat16 leave room for the product.
    tied = (0.005 + torch.rand(out, layout.groups, 1) * 0.01).bfloat16().float() * torch.tensor([3, 1])
    own = copies(packed.nbytes + scale.nbytes, lambda: (packed.clone(), scale.clone()))
    own_tied = copies(packed.nbytes + scale.nbytes, lambda: (packed.clone(), tied.half()))

    def multiply(tensors, activations="exact"):
        return kernels.matmul(xb, *tensors, layout, None, activations)

    fns = {
        "bf16": copies(2 * out * width, lambda: torch.randn(shape).bfloat16())(lambda weight: F.linear(xb, weight)),
        "fp32": copies(4 * out * width, lambda: torch.randn(shape))(lambda weight: F.linear(x, weight)),
        "exact": own(multiply),
        "exact again": own(multiply, 1 / 4),
        "int8": own(partial(multiply, activations="int8"), 2 / 4),
        "tied int8": own_tied(partial(multiply, activations="int8")),
    }
    if "avx2" in native.supported() and native.variant() != "avx2" and m == 1:
        avx2 = cpu.Kernel(native.load(cpu.SOURCE, "avx2"), "avx2")
        fns["exact avx2"] = own(lambda tensors: avx2.gemv(xb, *tensors, layout), 3 / 4)
    if width % GROUP_SIZE == 0 and out % 64 == 0:
        codes = torch.randint(4, 13, shape, dtype=torch.int32)
        int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        int4_scale = torch.rand(width // GROUP_SIZE, out, 2).bfloat16()
        fns["torch int4"] = copies(int4.nbytes + int4_scale.nbytes, lambda: (int4.clone(), int4_scale.clone()))(
            lambda tensors: torch.ops.aten._weight_int4pack_mm_for_cpu(xb, tensors[0], GROUP_SIZE, tensors[1])
        )
    return fns


def race(fns: dict[str, Callable], threads: int) -> dict[str, float]:
    """Median seconds of each function, all in turns, in changing order."""
    once = {name: clock(fn, threads) for name, fn in fns.items()}
    once = {name: clock(fn, threads, 3) for name, fn in fns.items()}
    times = {name: max(1, int(2e-4 / seconds)) for name, seconds in once.items()}  # calls that are timed together
    turn = sum(once[name] * times[name] for name in fns)
    seconds = {name: [] for name in fns}
    order, shuffle = list(fns), Random(0).shuffle  # who comes after the one that reads most finds the caches emptiest
    for _ in range(min(301, max(9, int(TIME / turn)))):
        shuffle(order)
        for name in order:
            seconds[name].append(clock(fns[name], threads, times[name]))
    return {name: median(values) for name, values in seconds.items()}


def decode(model: str, name: str, shape: tuple[int, int], bar: float, threads: int, environment: dict) -> dict:
    seconds = race(contestants(shape, 1), threads)
    layout = layout_of(shape[1], GROUP_SIZE, planes=2)
    bytes_read = shape[0] * (layout.row_bytes + 2 * layout.groups * layout.num_scales)
    base = min(seconds["bf16"], seconds["fp32"])
    row = {
        "model": model,
        "projection": name,
        "shape": list(shape),
        "bar": bar,
        "seconds": seconds,
        "ratios": {name: base / value for name, value in seconds.items()},
        "spread": max(seconds["exact"], seconds["exact again"]) / min(seconds["exact"], seconds["exact again"]),
        "roofline_seconds": bytes_read / environment["gigabytes_per_second"] / 1e9,
    }
    print(
        model,
        name,
        {name: f"{value * 1e6:.1f} us, {base / value:.2f}x" for name, value in seconds.items()},
        flush=True,
    )
    return row


def batches(shape: tuple[int, int], threads: int) -> list[dict]:
    rows = []
    for m in BATCHES:
        seconds = race({name: fn for name, fn in contestants(shape, m).items() if name != "exact again"}, threads)
        rows.append({"shape": list(shape), "m": m, "seconds": seconds})
        print(shape, m, {name: f"{value * 1e6:.0f} us" for name, value in seconds.items()}, flush=True)
    return rows


def bars(rows: list[dict]) -> list[dict]:
    large = rows[0]
    found = [(f"{large['projection']}, exact: at least 2.5x", large["ratios"]["exact"], 2.5)]
    found.append((f"{large['projection']}, int8: at least {INT8_BAR}x", large["ratios"]["int8"], INT8_BAR))
    against = large["seconds"]["torch int4"] / large["seconds"]["tied int8"]
    found.append((f"{large['projection']}, int8 on tied scales: not slower than torch's int4", against, 1.0))
    for model, bar in (("Qwen3-0.6B", 1.3), ("SmolLM2-135M", 1.0)):
        lowest = min(row["ratios"]["exact"] for row in rows if row["model"] == model)
        found.append((f"the shapes of {model}, exact: at least {bar}x each", lowest, bar))
    return [{"bar": text, "measured": f"{value:.2f}x", "met": value >= bar} for text, value, bar in found]


def render(result: dict) -> str:
    """The tables in Markdown."""
    environment = result["environment"]
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    names = ["bf16", "fp32", "exact", "exact avx2", "int8", "tied int8", "torch int4"]
    lines = [
        f"# Multiplication by a PTQTP matrix, {threads}",
        "",
        "| bar | measured | met |",
        "|---|---:|---|",
        *(f"| {bar['bar']} | {bar['measured']} | {'yes' if bar['met'] else '**no**'} |" for bar in result["bars"]),
        "",
        "One activation (decode), two planes, groups of 128. Microseconds, and how many times faster than the faster of `F.linear` "
        "in bfloat16 and float32.",
        "",
        "| shape (out x in) | " + " | ".join(names) + " | memory alone | exact / exact |",
        "|---|" + "---:|" * (len(names) + 2),
    ]
    for row in result["decode"]:
        shape = (
            f"{row['model']} {row['projection']}: {row['shape'][0]} x {row['shape'][1]}"
            if row["model"]
            else row["projection"]
        )
        cells = [_cell(row["seconds"], row["ratios"], name) for name in names]
        lines.append(f"| {shape} | {' | '.join(cells)} | {row['roofline_seconds'] * 1e6:.1f} | {row['spread']:.2f} |")
    names = ["bf16", "fp32", "exact", "int8", "tied int8", "torch int4"]
    lines += [
        "",
        "More activations at a time (microseconds). `int8` acts on up to three; beyond 16 with AVX-512, and 8 with AVX2, panels of the matrix "
        "are expanded for torch's own multiplication.",
        "",
        "| shape (out x in) | activations | " + " | ".join(names) + " |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for row in result["batches"]:
        cells = [f"{row['seconds'][name] * 1e6:.0f}" if name in row["seconds"] else "-" for name in names]
        lines.append(f"| {row['shape'][0]} x {row['shape'][1]} | {row['m']} | {' | '.join(cells)} |")
    timed = "processor time of the thread" if environment["threads"] == 1 else "time by the clock"
    lines += [
        "",
        f"- Instructions: {environment['instructions']}; {threads}; {timed}, medians of interleaved runs. Weights are taken in turn from copies "
        "of more than 256 MB each.",
        f"- `memory alone` is the bytes of the packed matrix and its scales at {environment['gigabytes_per_second']:.1f} GB/s, what a sum over "
        "512 MB reads in a second. `exact / exact` is the same contestant twice, slower over faster.",
        "- Everything is called through `kernels.matmul`, choice of the path included, with bfloat16 activations; `exact avx2` is the kernel "
        "itself. `exact` multiplies in float32; `int8` rounds activations to 8 bits. `torch int4` is `_weight_int4pack_mm_for_cpu`, which needs "
        "tied scales, a width that groups divide, and rounds the scales to bfloat16.",
        f"- torch {environment['torch']}, {environment['machine']}, load average at the start {environment['load']:.1f}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(seconds: dict[str, float], ratios: dict[str, float], name: str) -> str:
    return f"{seconds[name] * 1e6:.1f} ({ratios[name]:.2f}x)" if name in seconds else "-"


if __name__ == "__main__":
    main()
