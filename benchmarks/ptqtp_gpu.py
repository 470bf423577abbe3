"""PTQTP on a GPU: whether the Triton kernels are right, and their times beside cuBLAS in bfloat16.

    python benchmarks/ptqtp_gpu.py                    all of it, a few minutes; prints tables, writes results/ptqtp_gpu.json
    python benchmarks/ptqtp_gpu.py --rows 1 16        only these numbers of rows of activations
    python benchmarks/ptqtp_gpu.py --sweep            also tries tile sizes and splits, which are constants of the kernels

Every time is the median of graph replays that go round copies of a weight, more than the GPU's caches hold, so that weights come
from memory and no launch is waited for. `A/A` is the ratio of two measurements of the baseline. A cell that fails prints its error,
and the others go on. The kernels' own tests run with `python -m pytest tests/quantizers/test_triton.py`.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F


RESULTS = Path(__file__).parent / "results" / "ptqtp_gpu.json"
# (out_features, in_features)
SHAPES = {
    "4096 x 4096 (also Qwen3-8B q, o)": (4096, 4096),
    "14336 x 4096": (14336, 4096),
    "Qwen3-8B k, v": (1024, 4096),
    "Qwen3-8B gate, up": (12288, 4096),
    "Qwen3-8B down": (4096, 12288),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
ROTATED = 512 << 20  # bytes of weights that are gone round
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of activations")
    parser.add_argument("--sweep", action="store_true", help="time other tile sizes and splits, too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device.", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)

    result = {"environment": attempt(environment)}
    print(json.dumps(result["environment"], indent=2))
    result["correctness"] = table("Correctness", [attempt(check, *case) for case in correctness_cases()])
    result["door"] = table(
        "Through the layer", [attempt(case) for case in (check_layer, check_compiled, check_gradient)]
    )
    result["solver"] = table("Solver", [attempt(solver, *case) for case in solver_cases()])
    rows = [attempt(multiplication, name, *shape, m) for name, shape in SHAPES.items() for m in args.rows]
    result["multiplication"] = table("Two planes against cuBLAS bf16", rows)
    others = [attempt(multiplication, "4096 x 4096", 4096, 4096, 1, planes) for planes in (1, 3)]
    result["planes"] = table("One and three planes", others)
    if args.sweep:
        for m, block_m in ((1, 1), (8, 16), (16, 16), (64, 64), (128, 128)):
            found = [attempt(sweep, name, *shape, m, block_m) for name, shape in SHAPES.items()]
            result[f"sweep {m}"] = table(f"Best tiles for {m} rows", found)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    failed = [
        row
        for rows in result.values()
        for row in rows
        if isinstance(row, dict) and ("error" in row or row.get("ok") is False)
    ]
    print(f"\n{len(failed)} cell(s) failed; written to {RESULTS}")
    return 1 if failed else 0


def attempt(function: Callable[..., dict], *args) -> dict:
    """The result of a cell, or its error."""
    try:
        return function(*args)
    except Exception as error:
        torch.cuda.empty_cache()
        where = {"cell": " ".join([function.__name__, *map(str, args)])}
        return where | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def table(title: str, rows: list[dict]) -> list[dict]:
    """Prints rows under the columns of the first that has not failed."""
    print(f"\n{title}")
    columns = next((list(row) for row in rows if "error" not in row), [])
    cells = [[show(row.get(column, "")) for column in columns] for row in rows if "error" not in row]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells] if columns else []:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for row in rows:
        if "error" in row:
            print(f"FAILED {row['cell']}: {row['error']}")
    sys.stdout.flush()
    return rows


def show(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def environment() -> dict:
    import triton

    device = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = replay_seconds([lambda: target.copy_(source)])
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory": device.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "copy_gb_per_second": 2 * source.numel() / seconds / 1e9,
    }


def replay_seconds(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of a call, when all are replayed one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and makes the handles of cuBLAS
        for call in calls[:1] * 2 + calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


# Random matrices.


def random_packed(layout, out_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of random codes in use, and scales."""
    from hf_rb.quantizers.kernels.layout import pack

    codes = [
        torch.randint(len(part.basis[0]), (out_features, layout.in_features), dtype=torch.uint8, device="cuda")
        for part in layout.parts
    ]
    scale = torch.rand(out_features, layout.groups, layout.num_scales, device="cuda") * 0.02 + 0.005
    return pack(codes, layout), scale.half()


def tolerance(dtype: torch.dtype, rows: int, group_size: int = 128) -> float:
    """In bfloat16 the weights of many rows, or of long groups, are rounded, as they are in the baseline."""
    if dtype == torch.float32:
        return 1e-6
    return 3e-3 if rows > 64 or (group_size > 128 and rows > 8) else 2e-3


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if math.isfinite(error) else math.inf


# Correctness, against a float64 product with the matrix that torch unpacks.


def layouts() -> dict:
    from hf_rb.quantizers.kernels.layout import Layout, Part
    from hf_rb.quantizers.ptqtp.format import layout_of

    signs = Part(2, ((-1, 1, -1, 1), (-1, -1, 1, 1)))
    return {
        "1 plane": layout_of(4096, 128, 1),
        "2 planes": layout_of(4096, 128, 2),
        "3 planes": layout_of(4096, 128, 3),
        "2 planes, short last group": layout_of(576, 128, 2),
        "3 planes, odd groups": layout_of(1000, 48, 3),
        "3 sign planes": Layout(1024, 64, (signs, Part(1, ((-1, 1),)))),
        "2-bit grid": Layout(1024, 64, (Part(2, ((0, 1, 2, 3), (1, 1, 1, 1))),)),
        "long groups": layout_of(2048, 512, 2),
    }


def correctness_cases() -> list[tuple]:
    return [(name, dtype, rows) for name in layouts() for dtype in TYPES for rows in (1, 3, 8, 17, 100, 300)]


def check(name: str, dtype: torch.dtype, rows: int) -> dict:
    from hf_rb.quantizers.kernels import reference, triton

    layout = layouts()[name]
    weight, scale = random_packed(layout, 1000)
    matrix = reference.dequantize(weight, scale, layout, torch.float32)
    exact = torch.equal(triton.dequantize(weight, scale, layout, torch.float32), matrix)
    x = torch.randn(rows, layout.in_features, device="cuda").to(dtype)
    poison = torch.full((rows, 1000), math.nan, dtype=dtype, device="cuda")
    del poison  # an output that is not written reads it again
    error = relative(triton.matmul(x, weight, scale, layout), x.double() @ matrix.double().T)
    limit = tolerance(dtype, rows, layout.group_size)
    if not exact or not error <= limit:
        raise AssertionError(f"relative error {error:.2e}, at most {limit}; dequantized exactly: {exact}")
    return {"layout": name, "type": str(dtype).removeprefix("torch."), "rows": rows, "relative error": error}


def layer_and_matrix(bias: bool = True):
    from hf_rb.quantizers.ptqtp.format import layout_of
    from hf_rb.quantizers.ptqtp.layers import PTQTPLinear
    from hf_rb.quantizers.ptqtp.solver import quantize_matrix

    weight = torch.randn(768, 1024, device="cuda") * 0.02
    found = quantize_matrix(weight)
    layer = PTQTPLinear(1024, 768, bias, layout_of(1024, 128, 2), device="cuda", dtype=torch.bfloat16)
    layer.weight.data, layer.weight_scale.data = found.packed, found.scales
    torch.nn.init.normal_(layer.bias)
    return layer, layer.dequantize(torch.float32)


def check_layer() -> dict:
    layer, matrix = layer_and_matrix()
    x = torch.randn(2, 3, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        error = relative(layer(x), F.linear(x.double(), matrix.double(), layer.bias.double()))
    return {"case": "forward", "error_of": "float64", "relative": error, "ok": error < 4e-3}


def check_compiled() -> dict:
    layer, _ = layer_and_matrix()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 3, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        error = relative(compiled(x), layer(x))
    return {"case": "torch.compile(fullgraph=True)", "error_of": "eager", "relative": error, "ok": error < 4e-3}


def check_gradient() -> dict:
    layer, matrix = layer_and_matrix()
    x = torch.randn(6, 1024, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    error = relative(x.grad, matrix.double().sum(0).expand(6, -1))
    return {"case": "gradient of the input", "error_of": "float64", "relative": error, "ok": error < 1e-5}


# Solver.


def solver_cases() -> list[tuple]:
    return [(2, {}), (2, {"scale_mode": "tied"}), (1, {}), (3, {}), (2, {"multistart": True})]


def solver(planes: int, options: dict) -> dict:
    from hf_rb.quantizers.ptqtp.solver import fit_scales, quantize_matrix

    weight = torch.randn(4096, 4096, device="cuda").bfloat16()
    settings = {"max_iter": 50, "tol": 1e-4, "tol_mode": "absolute", "scale_mode": "free"} | options

    def seconds(function: Callable[[], object], repeats: int) -> float:
        times = []
        for _ in range(repeats + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])  # the first compiles

    found = quantize_matrix(weight, planes=planes, **options)
    small = weight[:256].float()
    on_device, in_memory = (quantize_matrix(part, planes=planes, **options) for part in (small, small.cpu()))
    differing = (on_device.packed.cpu() != in_memory.packed).double().mean().item()
    whole = seconds(lambda: quantize_matrix(weight, planes=planes, **options), 5)
    fit = seconds(lambda: fit_scales(weight, 128, planes, **settings), 5)
    return {
        "planes": planes,
        "options": json.dumps(options),
        "fit, M weights/s": weight.numel() / fit / 1e6,
        "all, M weights/s": weight.numel() / whole / 1e6,
        "relative error": found.relative_error,
        "bytes unlike the CPU's": differing,
        "ok": differing < 1e-4 and abs(on_device.relative_error - in_memory.relative_error) < 1e-6,
    }


# Multiplication.


def copies(size: int) -> int:
    return max(2, -(-ROTATED // size))


def multiplication(name: str, out_features: int, in_features: int, rows: int, planes: int = 2) -> dict:
    from hf_rb.quantizers.kernels import triton
    from hf_rb.quantizers.ptqtp.format import layout_of

    layout = layout_of(in_features, 128, planes)
    x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
    weight, scale = random_packed(layout, out_features)
    dense = triton.dequantize(weight, scale, layout, torch.float32)
    error = relative(triton.matmul(x, weight, scale, layout), x.float() @ dense.T)

    size = weight.numel() + 2 * scale.numel()
    packed = [(weight.clone(), scale.clone()) for _ in range(copies(size))]
    ours = replay_seconds([lambda w=w, s=s: triton.matmul(x, w, s, layout) for w, s in packed])
    del packed
    dense = [dense.bfloat16().clone() for _ in range(copies(2 * dense.numel()))]
    calls = [lambda w=w: F.linear(x, w) for w in dense]
    baseline, again = replay_seconds(calls), replay_seconds(calls)
    return {
        "shape": name,
        "rows": rows,
        "planes": planes,
        "bf16 us": baseline * 1e6,
        "ours us": ours * 1e6,
        "speed-up": baseline / ours,
        "at most": 2 * out_features * in_features / size,
        "ours GB/s": size / ours / 1e9,
        "A/A": again / baseline,
        "relative error": error,
        "ok": error <= tolerance(torch.bfloat16, rows),
    }


def sweep(name: str, out_features: int, in_features: int, rows: int, block_m: int) -> dict:
    from hf_rb.quantizers.kernels.triton import gemm
    from hf_rb.quantizers.ptqtp.format import layout_of

    layout = layout_of(in_features, 128, 2)
    x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
    weight, scale = random_packed(layout, out_features)
    packed = [(weight.clone(), scale.clone()) for _ in range(copies(weight.numel() + 2 * scale.numel()))]

    def seconds(block_n: int, programs: int | None) -> float:
        options = {"block_m": block_m, "block_n": block_n, "programs": programs}
        return replay_seconds([lambda w=w, s=s: gemm.multiply(x, w, s, layout, **options) for w, s in packed], 10)

    chosen = seconds(gemm._block_n(out_features, layout), None)
    tried = {}
    for block_n in (16, 32, 64, 128):
        for programs in (1, 2, 4, 8, 16):
            if 2 * programs <= layout.groups:
                found = attempt(lambda n=block_n, p=programs: {"seconds": seconds(n, p)})
                tried[block_n, programs] = found.get("seconds", math.inf)
    best = min(tried, key=tried.get)
    return {
        "shape": name,
        "rows": rows,
        "chosen us": chosen * 1e6,
        "best us": tried[best] * 1e6,
        "block_n": best[0],
        "programs": best[1],
    }


if __name__ == "__main__":
    sys.exit(main())
