"""PTQTP and round-to-nearest on a real model: perplexity, bytes and seconds.

    python benchmarks/ptqtp_foundation.py MODEL_FOLDER TEXT_FILE

writes `benchmarks/results/ptqtp_foundation.json` and the table `ptqtp_foundation.md` beside it. PTQTP is quantized, saved and
loaded again from its file; round-to-nearest is simulated on the same layers, and its bytes are counted as a packed file would
have them (`rtn_bytes`).
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb import PTQTPConfig
from hf_rb.evaluation import model_size, perplexity
from hf_rb.quantizers import quantize
from hf_rb.quantizers.ptqtp import solve


RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 128
TOKENS = 16_384
WINDOW = 512
QK = ("q_proj", "k_proj")


@dataclass
class Row:
    """One line of the table. `seconds` is the time of quantizing alone, without reading and writing files."""

    method: str
    quantized: str
    perplexity: float
    relative_error: float | None
    file_bytes: int
    bits_per_weight: float
    layer_bits_per_weight: float
    seconds: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal language model in 16 bits")
    parser.add_argument("text", type=Path, help="text file; its first 16,384 tokens are used")
    args = parser.parse_args()

    result = {"model": args.model.resolve().name, "text": args.text.name, "tokens": TOKENS, "window": WINDOW}
    result["environment"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    result["solver"] = solver_speed()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = first_tokens(tokenizer, args.text.read_text(encoding="utf-8"))

    def measure(model) -> float:
        return perplexity(model, tokenizer, text, window=WINDOW, stride=WINDOW).perplexity

    rows = []
    for row in all_rows(args.model, measure):
        rows.append(row)
        print(row, flush=True)
    result["rows"] = [asdict(row) for row in rows]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ptqtp_foundation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "ptqtp_foundation.md").write_text(render(result), encoding="utf-8")


def first_tokens(tokenizer, text: str) -> str:
    """The part of a text that its first `TOKENS` tokens cover."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[TOKENS - 1][1]]


def solver_speed() -> dict[str, float]:
    """Weights a second on a Gaussian matrix, by the clock and by the processor time of all threads."""
    weight = (torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    solve(weight[:512])
    runs = []
    for _ in range(5):
        clock, processor = time.perf_counter(), time.process_time()
        solve(weight)
        runs.append((time.perf_counter() - clock, time.process_time() - processor))
    clock, processor = (sorted(values)[len(values) // 2] for values in zip(*runs, strict=True))
    return {
        "weights_per_second": weight.numel() / clock,
        "weights_per_processor_second": weight.numel() / processor,
        "fastest_to_slowest": min(runs)[0] / max(runs)[0],
    }


def all_rows(source: Path, measure) -> Iterator[Row]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    full = model_size(source)
    yield Row("16-bit", "-", measure(model), None, full.file_bytes, full.bits_per_weight, 16.0, None)

    for quantize_qk in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            config = PTQTPConfig(group_size=GROUP_SIZE, quantize_qk=quantize_qk)
            report = quantize(source, Path(folder) / "model", config)
            size = model_size(Path(folder) / "model")
            loaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
            error = sum(layer.weights * layer.relative_error for layer in report.layers)
            yield Row(
                "PTQTP, dense",
                layers(quantize_qk),
                measure(loaded),
                error / sum(layer.weights for layer in report.layers),
                size.file_bytes,
                size.bits_per_weight,
                size.quantized_bits_per_weight,
                report.seconds,
            )

    names = [layer.name for layer in report.layers]  # the last run left q and k out
    for quantize_qk in (True, False):
        kept = [name for name, _ in model.named_modules() if name in names or quantize_qk and name.endswith(QK)]
        original = {name: model.get_submodule(name).weight.data for name in kept}
        weights = sum(weight.numel() for weight in original.values())
        for bits in (3, 4):
            for symmetric in (True, False):
                start, error = time.perf_counter(), 0.0
                for name, weight in original.items():
                    model.get_submodule(name).weight.data = rounded = round_to_nearest(weight, bits, symmetric)
                    error += weight.numel() * ((rounded - weight).norm() / weight.norm()).item()
                seconds = time.perf_counter() - start
                packed = sum(rtn_bytes(weight, bits, symmetric) for weight in original.values())
                file_bytes = full.file_bytes - 2 * weights + packed
                kind = "symmetric" if symmetric else "asymmetric"
                yield Row(
                    f"RTN {bits} bits, {kind}",
                    layers(quantize_qk),
                    measure(model),
                    error / weights,
                    file_bytes,
                    8 * file_bytes / full.weights,
                    8 * packed / weights,
                    seconds,
                )
        for name, weight in original.items():
            model.get_submodule(name).weight.data = weight


def layers(quantize_qk: bool) -> str:
    return "all linear layers" if quantize_qk else "all but q, k"


def round_to_nearest(weight: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """Rounds to the uniform grid between the extremes of each group, with a float16 scale (and an integer zero point)."""
    last = 2**bits - 1
    parts = []
    for block in weight.split(GROUP_SIZE, dim=1):
        if symmetric:
            high = block.abs().amax(1, keepdim=True)
            scale, zero = (2 * high / last).half().float(), (last + 1) / 2
        else:
            low, high = block.amin(1, keepdim=True).clamp(max=0), block.amax(1, keepdim=True).clamp(min=0)
            scale = ((high - low) / last).half().float()
            zero = (-low / scale).round().clamp(0, last)
        parts.append(((block / scale).round().add(zero).clamp(0, last) - zero) * scale)
    return torch.cat(parts, dim=1)


def rtn_bytes(weight: torch.Tensor, bits: int, symmetric: bool) -> int:
    """Codes without a gap, a float16 scale a group, and a zero point of as many bits as a code."""
    groups = weight.shape[0] * -(-weight.shape[1] // GROUP_SIZE)
    return -(-(weight.numel() * bits + groups * (16 + (0 if symmetric else bits))) // 8)


def render(result: dict) -> str:
    """The table in Markdown."""
    solver, environment = result["solver"], result["environment"]
    header = [
        "method",
        "quantized",
        "perplexity",
        "relative error",
        "file bytes",
        "bits/weight",
        "in the layers",
        "seconds",
    ]
    lines = [
        f"# PTQTP on {result['model']}",
        "",
        f"Perplexity on the first {result['tokens']:,} tokens of `{result['text']}` in windows of {result['window']} tokens that do not "
        "overlap, computed in float32.",
        "",
        "| " + " | ".join(header) + " |",
        "|---|---|" + "---:|" * 6,
    ]
    for row in map(lambda row: Row(**row), result["rows"]):
        cells = [
            row.method,
            row.quantized,
            f"{row.perplexity:.2f}",
            "-" if row.relative_error is None else f"{row.relative_error:.4f}",
            f"{row.file_bytes:,}",
            f"{row.bits_per_weight:.2f}",
            f"{row.layer_bits_per_weight:.2f}",
            "-" if row.seconds is None else f"{row.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "- Group size 128 everywhere; a short last group of a row has scales of its own. `bits/weight` is eight times the bytes of "
        "the whole file over all weights, 16-bit embeddings included; `in the layers` counts the quantized layers and their scales alone.",
        "- PTQTP is the literal algorithm, quantized, saved and loaded from its file. Round-to-nearest (RTN) is simulated with "
        "float16 scales; its bytes are those of gapless codes, scales and zero points. Neither uses calibration data.",
        "- SmolLM2's 16-bit weights were restored from a 4-bit file with groups of 32 (Q4_1). They are what `16-bit` means here, "
        "and 4-bit grids may look better on them than on weights that never were on one.",
        f"- Solver: {solver['weights_per_second'] / 1e6:.1f} M weights/s by the clock with torch on {environment['threads']} thread(s), "
        f"{solver['weights_per_processor_second'] / 1e6:.1f} M per processor second, for a Gaussian 4096 x 4096 matrix in bfloat16 "
        f"(median of 5, fastest to slowest {solver['fastest_to_slowest']:.2f}; load average at the start {environment['load']:.1f}).",
        f"- torch {environment['torch']}, transformers {environment['transformers']}, {environment['machine']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
