"""PTQTP, round-to-nearest and HQQ on a real model: perplexity at the bytes of the whole file.

    python benchmarks/ptqtp_quality.py MODEL_FOLDER TEXT_FILE [--hqq FOLDER]

writes `benchmarks/results/ptqtp_quality.json` and the table `ptqtp_quality.md` beside it, sorted by bytes. PTQTP goes through its
file: the checkpoint is quantized tensor by tensor and its stored tensors are read back. The peers are applied to the same
layers in memory, and their bytes are counted as codes, scales and zero points without a gap. HQQ is not a dependency: install
it into a folder (`pip install --no-deps --target FOLDER hqq termcolor`) and name that.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb import PTQTPConfig
from hf_rb.evaluation import model_size, perplexity
from hf_rb.io.safetensors import Checkpoint
from hf_rb.quantizers import dequantize_checkpoint, quantize_checkpoint
from hf_rb.quantizers.packed.baseline import round_to_nearest


RESULTS = Path(__file__).parent / "results"
TOKENS, WINDOW = 16_384, 512
QK = ("q_proj", "k_proj")
# name, options, whether also without q and k
PTQTP = [
    ("PTQTP", {}, True),
    ("PTQTP, tied scales", {"scale_mode": "tied"}, True),
    ("PTQTP, several starts", {"multistart": True}, False),
    ("PTQTP, 1 plane", {"planes": 1}, False),
    ("PTQTP, 3 planes", {"planes": 3}, False),
]
# name, bits, group size, whether also without q and k
PEERS = [("RTN", 3, 128, True), ("RTN", 3, 64, False), ("RTN", 4, 128, True)]
HQQ = [("HQQ", 3, 128, True), ("HQQ", 3, 64, False), ("HQQ", 4, 128, True)]


@dataclass
class Row:
    """One line of the table. `largest_error` is that of the largest thousandth of the weights; `seconds` are of quantizing alone."""

    method: str
    quantized: str
    perplexity: float
    relative_error: float | None
    largest_error: float | None
    file_bytes: int
    bits_per_weight: float
    layer_bits_per_weight: float
    seconds: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal language model in 16 bits")
    parser.add_argument("text", type=Path, help="text file; its first 16,384 tokens are used")
    parser.add_argument("--hqq", type=Path, help="folder into which HQQ was installed")
    args = parser.parse_args()

    result = {"model": args.model.resolve().name, "text": args.text.name, "tokens": TOKENS, "window": WINDOW}
    result["environment"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text(encoding="utf-8")
    text = text[: tokenizer(text, return_offsets_mapping=True)["offset_mapping"][TOKENS - 1][1]]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    bench = Bench(
        args.model, model, lambda: perplexity(model, tokenizer, text, window=WINDOW, stride=WINDOW).perplexity
    )
    rows = []
    for row in bench.rows(args.hqq):
        rows.append(row)
        print(row, flush=True)
    result["rows"] = [asdict(row) for row in sorted(rows, key=lambda row: row.file_bytes)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ptqtp_quality.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "ptqtp_quality.md").write_text(render(result), encoding="utf-8")


class Bench:
    """One model in float32 whose weights are replaced again and again."""

    def __init__(self, source: Path, model: torch.nn.Module, measure: Callable[[], float]):
        self.source, self.model, self.measure = source, model, measure
        self.size = model_size(source)
        head = model.get_output_embeddings()
        self.weights = {
            name: module.weight.data.clone()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }

    def rows(self, hqq: Path | None) -> Iterator[Row]:
        yield Row(
            "16-bit", "-", self.measure(), None, None, self.size.file_bytes, self.size.bits_per_weight, 16.0, None
        )
        for name, options, without_qk in PTQTP:
            for quantize_qk in (True, False)[: 1 + without_qk]:
                yield self.ptqtp(name, PTQTPConfig(quantize_qk=quantize_qk, **options))
        peers = [(*peer, lambda weight, bits, group: round_to_nearest(weight, bits, group)) for peer in PEERS]
        if hqq:
            peers += [(*peer, load_hqq(hqq)) for peer in HQQ]
        for name, bits, group, without_qk, function in peers:
            for quantize_qk in (True, False)[: 1 + without_qk]:
                yield self.peer(name, bits, group, quantize_qk, function)

    def ptqtp(self, name: str, config: PTQTPConfig) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            quantized, plain = Path(folder) / "quantized", Path(folder) / "plain"
            report = quantize_checkpoint(self.source, quantized, config)
            size = model_size(quantized)
            dequantize_checkpoint(quantized, plain, dtype="float32")
            stored = Checkpoint(plain).entries
            weights = {layer.name: stored[f"{layer.name}.weight"].read() for layer in report.layers}
        sizes = size.file_bytes, size.bits_per_weight, size.quantized_bits_per_weight
        errors = report.error(), self.largest_error(weights)
        return Row(name, layers(config.quantize_qk), self.evaluate(weights), *errors, *sizes, report.seconds)

    def peer(self, name: str, bits: int, group: int, quantize_qk: bool, function: Callable) -> Row:
        weights = {name: weight for name, weight in self.weights.items() if quantize_qk or not name.endswith(QK)}
        start = time.perf_counter()
        rounded = {name: function(weight, bits, group) for name, weight in weights.items()}
        seconds = time.perf_counter() - start
        total = sum(weight.numel() for weight in weights.values())
        errors = (
            weight.numel() * ((rounded[name] - weight).norm() / weight.norm()) ** 2 for name, weight in weights.items()
        )
        # HQQ's groups run over the ends of rows, and its zero points are float16; those of RTN are integers.
        groups = sum(-(-weight.numel() // group) for weight in weights.values())
        if name == "RTN":
            groups = sum(len(weight) * -(-weight.shape[1] // group) for weight in weights.values())
        packed = -(-(total * bits + groups * (32 if name == "HQQ" else 16 + bits)) // 8)
        file_bytes = self.size.file_bytes - 2 * total + packed
        sizes = file_bytes, 8 * file_bytes / self.size.weights, 8 * packed / total
        error = (sum(errors).item() / total) ** 0.5
        label = f"{name}, {bits} bits, group {group}"
        errors = error, self.largest_error(rounded)
        return Row(label, layers(quantize_qk), self.evaluate(rounded), *errors, *sizes, seconds)

    def largest_error(self, weights: dict[str, torch.Tensor]) -> float:
        """Relative error of the thousandth of every layer's weights that is largest in magnitude."""
        error = energy = 0.0
        for name, found in weights.items():
            weight = self.weights[name].flatten()
            largest = weight.abs().topk(weight.numel() // 1000).indices
            error += (found.flatten()[largest] - weight[largest]).square().sum().item()
            energy += weight[largest].square().sum().item()
        return (error / energy) ** 0.5

    def evaluate(self, weights: dict[str, torch.Tensor]) -> float:
        for name, weight in self.weights.items():
            self.model.get_submodule(name).weight.data.copy_(weights.get(name, weight))
        return self.measure()


def layers(quantize_qk: bool) -> str:
    return "all linear layers" if quantize_qk else "all but q, k"


def load_hqq(folder: Path) -> Callable:
    sys.path.insert(0, str(folder))
    from hqq.core.quantize import Quantizer

    def quantize(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
        options = dict(channel_wise=True, round_zero=False, optimize=True, axis=1)
        packed, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=group, compute_dtype=torch.float16, device="cpu", **options
        )
        meta = meta | {key: meta[key].half().float() for key in ("scale", "zero")}
        return Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32}).float()

    return quantize


def render(result: dict) -> str:
    """The table in Markdown."""
    header = [
        "method",
        "quantized",
        "file MB",
        "bits/weight",
        "in the layers",
        "relative error",
        "of the largest",
        "perplexity",
        "seconds",
    ]
    lines = [
        f"# Quality of PTQTP at its bytes: {result['model']}",
        "",
        f"Perplexity on the first {result['tokens']:,} tokens of `{result['text']}` in windows of {result['window']} tokens that do not "
        "overlap, computed in float32 and sorted by the bytes of the whole file.",
        "",
        "| " + " | ".join(header) + " |",
        "|---|---|" + "---:|" * 7,
    ]
    for row in map(lambda row: Row(**row), result["rows"]):
        cells = [
            row.method,
            row.quantized,
            f"{row.file_bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.layer_bits_per_weight:.2f}",
            "-" if row.relative_error is None else f"{row.relative_error:.4f}",
            "-" if row.largest_error is None else f"{row.largest_error:.4f}",
            f"{row.perplexity:.2f}" if row.perplexity < 1e4 else f"{row.perplexity:.1e}",
            "-" if row.seconds is None else f"{row.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    environment = result["environment"]
    lines += [
        "",
        "- `bits/weight` is eight times the bytes of the whole file over all weights, 16-bit embeddings included; `in the layers` "
        "counts the quantized layers with their scales. `of the largest` is the relative error of the thousandth of a layer's weights "
        "that is largest in magnitude.",
        "- PTQTP: group 128, dense packing, quantized and read back from its file. Two planes are the paper's method; tied scales, "
        "several starts, one and three planes are ours. A tied layer takes 4.13 bits in the GPTQ format.",
        "- RTN (round to nearest: float16 scale, integer zero point) and HQQ (half-quadratic: float16 scale and zero point) are "
        "applied to the same layers; their bytes are those of codes without a gap. HQQ's groups run over the ends of rows. None of the methods sees any data.",
        "- SmolLM2's 16-bit weights were restored from a 4-bit file with groups of 32 (Q4_1). They are what `16-bit` means here, "
        "and 4-bit grids may look better on them than on weights that never were on one.",
        f"- `seconds` is quantizing alone on {environment['threads']} thread(s); load average at the start "
        f"{environment['load']:.1f}. torch {environment['torch']}, transformers {environment['transformers']}, "
        f"{environment['machine']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
