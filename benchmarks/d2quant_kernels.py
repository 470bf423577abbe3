"""How fast a D²Quant layer multiplies one activation, against the faster of `F.linear` in bfloat16 and in float32.

    python benchmarks/d2quant_kernels.py [--threads 1]

writes `benchmarks/results/d2quant_kernels.json` and the table `d2quant_kernels.md` beside it. Shapes, clocks and the order of the
contestants are those of `ptqtp_kernels.py`.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from ptqtp_kernels import DECODE, GROUP_SIZE, copies, environment, race, write

from hf_rb.io import native
from hf_rb.quantizers import kernels
from hf_rb.quantizers.d2quant.format import layout_of
from hf_rb.quantizers.kernels import cpu
from hf_rb.quantizers.kernels.layout import Layout


KINDS = {
    "2 bits": (2, False),
    "2 bits, DSQ": (2, True),
    "3 bits": (3, False),
    "3 bits, DSQ": (3, True),
    "4 bits": (4, False),
}
BAR = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = environment(args.threads)
    with torch.inference_mode():
        rows = [decode(model, name, shape, args.threads) for model, name, shape, _ in DECODE]
    result = {"environment": where, "decode": rows, "bars": bars(rows)}
    write("d2quant_kernels", result, render(result))


def contestants(shape: tuple[int, int]) -> dict[str, Callable]:
    """What multiplies one activation by a matrix of this shape."""
    out, width = shape
    x = torch.randn(1, width)
    xb = x.bfloat16()
    fns = {
        "bf16": copies(2 * out * width, lambda: torch.randn(shape).bfloat16())(lambda weight: F.linear(xb, weight)),
        "fp32": copies(4 * out * width, lambda: torch.randn(shape))(lambda weight: F.linear(x, weight)),
    }
    avx2 = native.variant() != "avx2" and "avx2" in native.supported()
    other = cpu.Kernel(native.load(cpu.SOURCE, "avx2"), "avx2") if avx2 else None
    for start, (name, kind) in enumerate(KINDS.items()):
        layout = layout_of(width, GROUP_SIZE, *kind)
        take = copies(size(out, layout), lambda layout=layout: packed(out, layout))
        fns[name] = take(lambda tensors, layout=layout: kernels.matmul(xb, *tensors, layout), start / 7)
        if other:
            fns[f"{name}, avx2"] = take(
                lambda tensors, layout=layout: other.gemv(xb, *tensors, layout), start / 7 + 1 / 2
            )
    return fns


def packed(out: int, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 256, (out, layout.row_bytes), dtype=torch.uint8)
    return codes, (torch.rand(out, layout.groups, layout.num_scales) * 0.02).half()


def size(out: int, layout: Layout) -> int:
    return out * (layout.row_bytes + 2 * layout.groups * layout.num_scales)


def decode(model: str, name: str, shape: tuple[int, int], threads: int) -> dict:
    seconds = race(contestants(shape), threads)
    base = min(seconds["bf16"], seconds["fp32"])
    ratios = {name: base / value for name, value in seconds.items()}
    bits = {
        name: 8 * size(shape[0], layout_of(shape[1], GROUP_SIZE, *kind)) / (shape[0] * shape[1])
        for name, kind in KINDS.items()
    }
    print(
        model,
        name,
        {name: f"{value * 1e6:.1f} us, {ratios[name]:.2f}x" for name, value in seconds.items()},
        flush=True,
    )
    return {
        "model": model,
        "projection": name,
        "shape": list(shape),
        "seconds": seconds,
        "ratios": ratios,
        "bits": bits,
    }


def bars(rows: list[dict]) -> list[dict]:
    found = []
    for name in KINDS:
        for which in (name, f"{name}, avx2"):
            if which in rows[0]["ratios"]:
                found.append(
                    (
                        f"{which}: faster than bfloat16 and float32 on every shape",
                        min(row["ratios"][which] for row in rows),
                    )
                )
    return [{"bar": text, "measured": f"{value:.2f}x", "met": value > BAR} for text, value in found]


def render(result: dict) -> str:
    """The tables in Markdown."""
    environment, rows = result["environment"], result["decode"]
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    names = [name for name in rows[0]["seconds"]]
    lines = [
        f"# Multiplication of one activation by a D²Quant matrix, {threads}",
        "",
        "| bar | slowest shape | met |",
        "|---|---:|---|",
        *(f"| {bar['bar']} | {bar['measured']} | {'yes' if bar['met'] else '**no**'} |" for bar in result["bars"]),
        "",
        "Microseconds, and how many times faster than the faster of `F.linear` in bfloat16 and float32. Groups of 128.",
        "",
        "| shape (out x in) | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for row in rows:
        shape = f"{row['shape'][0]} x {row['shape'][1]}"
        title = f"{row['model']} {row['projection']}: {shape}" if row["model"] else shape
        cells = [f"{row['seconds'][name] * 1e6:.1f} ({row['ratios'][name]:.2f}x)" for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    bits = ", ".join(f"{name} {value:.3f}" for name, value in rows[0]["bits"].items())
    timed = "processor time of the thread" if environment["threads"] == 1 else "time by the clock"
    lines += [
        "",
        f"- Bits a weight in memory, scales included (4096 x 4096): {bits}. In files the grids take less: their zero points are "
        "stored as integers.",
        f"- Instructions: {environment['instructions']}; {threads}; {timed}, medians of interleaved runs. Weights are taken in turn from "
        "copies of more than 256 MB each.",
        f"- A sum over 512 MB reads {environment['gigabytes_per_second']:.1f} GB/s. torch {environment['torch']}, "
        f"{environment['machine']}, load average at the start {environment['load']:.1f}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
