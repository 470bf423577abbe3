"""D²Quant, its parts and its peers on a real model: perplexity at the bytes of the layers and of the whole file.

    python benchmarks/d2quant_quality.py MODEL_FOLDER TEXT_FOLDER [--bits 2 3] [--seeds 0 1 2] [--methods ...] [--calibration c4 gsm8k]

writes `benchmarks/results/d2quant_quality.json` and the table `d2quant_quality.md` beside it. TEXT_FOLDER holds `c4_demo.jsonl`,
`gsm8k_train.jsonl`, `gsm8k_test.jsonl` and `wikitext2_raw_test.txt`. Every cell goes through its file: the model is quantized, saved,
measured, loaded as an ordinary model and evaluated in float32. Cells that the JSON file has already are not computed again, so that
the table may be made in pieces; delete the file to begin anew.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb import D2QuantConfig
from hf_rb.evaluation import model_size, perplexity
from hf_rb.quantizers import quantize


RESULTS = Path(__file__).parent / "results"
GROUP, SAMPLES, SEQLEN = 64, 16, 512
TOKENS, WINDOW = 8_192, 512

PLAIN = {"dsq": False, "dac": False, "rotate": False}
METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"backend": "rtn", "dsq": False},
    "GPTQ": {"backend": "gptq", **PLAIN},
    "GPTAQ": PLAIN,
    "GPTAQ + rotation": {"dsq": False, "dac": False},
    "D²Quant without DSQ": {"dsq": False},
    "D²Quant without DAC": {"dac": False},
    "D²Quant": {},
    "D²Quant without rotation": {"rotate": False},
    "D²Quant, the paper's DSQ": {"dsq_weighting": "none"},
    "D²Quant, the paper's DSQ, without DAC": {"dsq_weighting": "none", "dac": False},
}
OTHER = {"c4": "gsm8k", "gsm8k": "c4"}
# What was asked for: the first has a lower perplexity on WikiText-2 than the second, over the seeds that both have.
BARS = [
    ("D²Quant", "GPTQ"),
    ("D²Quant", "GPTAQ"),
    ("D²Quant", "GPTAQ + rotation"),
    ("D²Quant without DAC", "GPTAQ + rotation"),
    ("D²Quant without DSQ", "GPTAQ + rotation"),
    ("D²Quant", "D²Quant, the paper's DSQ"),
    ("D²Quant, the paper's DSQ", "GPTAQ + rotation"),
]

ANALYSIS = """
## Reading it

- **What carries the gain at 2 bits is the weighted dual scales.** With the paper's fit, all columns alike, the same pipeline is behind GPTAQ +
  rotation on all three seeds. The correction alone changes nothing that could be told from the seeds: it is lower in two of three, and its mean
  is 0.8 % higher, so "no worse than without" is missed by the mean; beside dual scales it is 3 % lower.
- **Weighted columns.** The published fit of dual scales counts all columns alike, but in GPTQ's loop an error in column j costs
  1 / U[j, j]^2. Counted so, the output error of single down projections on unseen text falls in every case that was measured, by 2 to
  28 % at 2 bits and by 4 to 25 % at 3 ([table](d2quant_dsq.md)); in layer 2 without rotation the published fit is behind the affine grid.
- **Where the error is.** At 2 bits, rotated, mean of the first eight layers (measured once, seed 0, by hand), on sequences that were not
  calibrated on and against the output of the original model: query, key and value 0.25, output projection 0.50, gate and up 0.49, down
  0.65 (affine 0.661, the paper's DSQ 0.652, weighted 0.648). Most of it comes with the input from the quantized layers before; a single
  matrix's levels change it little, and perplexities differ between calibration seeds by up to a third: read single seeds with care.
- **GPTAQ's term does not over-fit** the 8,192 tokens. The same errors of down projections with `asym_alpha` 0, 0.25, 0.5 and 1: 0.660,
  0.648, 0.646, 0.678; for query, key and value 0.256, 0.251, 0.247, 0.247.
- **Bytes.** A second row scale in the down projections costs 2.4 % of the layers' bytes, column scales nothing. Rotation unties the
  embeddings: 57 MB more for the head, which is more than all quantized layers (31 MB) and leaves 54 % of the 16-bit file where 33 % would
  do. `rotate=False` keeps them tied.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal language model in 16 bits")
    parser.add_argument("texts", type=Path, help="folder of the texts")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--calibration", nargs="+", choices=OTHER, default=[*OTHER])
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # a process of its own, for its peak memory
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(measure(args.model, args.texts, json.loads(args.cell))))
        return

    file = RESULTS / "d2quant_quality.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"cells": []}
    result |= {
        "model": args.model.resolve().name,
        "setting": {"group_size": GROUP, "num_samples": SAMPLES, "seqlen": SEQLEN, "tokens": TOKENS, "window": WINDOW},
    }
    for cell in wanted(args):
        if any(cell.items() <= known.items() for known in result["cells"]):
            continue
        command = [sys.executable, __file__, args.model, args.texts, "--cell", json.dumps(cell)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result["cells"].append(json.loads(output.splitlines()[-1]))
        print(result["cells"][-1], flush=True)
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(render(result), encoding="utf-8")
    file.with_suffix(".md").write_text(render(result), encoding="utf-8")


def wanted(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The cells, those that decide first."""
    yield {"method": "16-bit", "bits": 16, "calibration": None, "seed": None}
    for bits in args.bits:
        if "RTN" in args.methods:
            yield {"method": "RTN", "bits": bits, "calibration": None, "seed": None}
        for calibration in args.calibration:
            for seed in args.seeds:
                for method in args.methods:
                    if method != "RTN":
                        yield {"method": method, "bits": bits, "calibration": calibration, "seed": seed}


def measure(model: Path, texts: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """One cell: quantized, saved, loaded and evaluated."""
    found: dict[str, Any] = dict(cell)
    with tempfile.TemporaryDirectory() as folder:
        saved, options = model, {}
        if cell["method"] != "16-bit":
            saved = Path(folder) / "quantized"
            start = time.perf_counter()
            report = quantize(model, saved, config(texts, cell))
            found["seconds"], found["relative_error"] = time.perf_counter() - start, report.error()
            found["hidden_error"] = report.blocks[-1].hidden_error if report.blocks else None
            found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            options = {"quantization_config": D2QuantConfig(dequantize=True)}
        size = model_size(saved)
        bits = size.quantized_bits_per_weight
        found["file_bytes"] = size.file_bytes
        found["layer_bytes"] = round(bits * size.quantized_weights / 8) if bits else None
        found["layer_bits"] = bits
        plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name in ("wikitext2", *({OTHER[cell["calibration"]]} if cell["calibration"] else OTHER)):
        text = evaluation_text(texts, name)
        text = text[: tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"][TOKENS - 1][1]]
        found[name] = perplexity(plain, tokenizer, text, window=WINDOW, stride=WINDOW).perplexity
    found["threads"], found["load"] = torch.get_num_threads(), os.getloadavg()[0]
    return found


def config(texts: Path, cell: dict[str, Any]) -> D2QuantConfig:
    options = {"bits": cell["bits"], "group_size": GROUP, **METHODS[cell["method"]]}
    if options.get("backend") != "rtn":
        options |= {"num_samples": SAMPLES, "seqlen": SEQLEN, "batch_size": 4, "seed": cell["seed"]}
        options["dataset"] = calibration_texts(texts, cell["calibration"])
    return D2QuantConfig(**options)


def calibration_texts(texts: Path, name: str) -> list[str]:
    if name == "c4":
        return [row["text"] for row in rows(texts / "c4_demo.jsonl")]
    return [f"{row['question']}\n{row['answer']}" for row in rows(texts / "gsm8k_train.jsonl")]


def evaluation_text(texts: Path, name: str) -> str:
    if name == "wikitext2":
        return (texts / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    if name == "c4":
        return "\n\n".join(calibration_texts(texts, "c4"))
    return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows(texts / "gsm8k_test.jsonl"))


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def render(result: dict[str, Any]) -> str:
    """The tables in Markdown."""
    setting = result["setting"]
    lines = [
        f"# Quality of D²Quant: {result['model']}",
        "",
        f"Groups of {setting['group_size']}, {setting['num_samples']} calibration sequences of {setting['seqlen']} tokens. "
        f"Perplexity in float32 on the first {setting['tokens']:,} tokens of each text in windows of {setting['window']} that do not "
        "overlap; mean over calibration seeds, and their standard deviation where there are several.",
    ]
    plain = next(cell for cell in result["cells"] if cell["method"] == "16-bit")
    for calibration, other in OTHER.items():
        if not any(cell["calibration"] == calibration for cell in result["cells"]):
            continue
        lines += ["", f"## Calibrated on {calibration}", ""]
        lines.append(
            f"| bits | method | seeds | bits/weight in the layers | layers MB | file MB | WikiText-2 | {other} | hidden error |"
        )
        lines.append("|---:|---|---:|---:|---:|---:|---:|---:|---:|")
        size = f"{plain['file_bytes'] / 1e6:.1f}"
        lines.append(f"| 16 | - | - | - | - | {size} | {plain['wikitext2']:.2f} | {plain[other]:.2f} | - |")
        for bits in sorted({cell["bits"] for cell in result["cells"]} - {16}):
            for method in METHODS:
                lines += _row(result["cells"], bits, method, calibration, other)
    lines += ["", "## Comparisons", "", "On WikiText-2, over the seeds that both rows have.", ""]
    lines += _comparisons(result["cells"])
    lines += ANALYSIS.splitlines()
    lines += [
        "",
        "## Notes",
        "",
        "- The rows `D²Quant` weigh the columns in the fit of dual scales by the Hessian, which is ours (`dsq_weighting='hessian'`, the "
        "default); `the paper's DSQ` counts all alike, as the paper and its released code do (`dsq_weighting='none'`). What that does "
        "layer by layer: [d2quant_dsq.md](d2quant_dsq.md).",
        "- `bits/weight in the layers` counts the stored bytes of the quantized layers: codes, float16 scales, packed zero points. "
        "`file MB` is the whole file, embeddings in 16 bits. Rotation unties the embeddings, so that the head is stored too: that "
        "is the difference between the files with and without it.",
        "- RTN sees no data; its range is searched as that of the others. All rows quantize all linear layers but the head.",
        "- `hidden error` is the relative error of the last decoder layer's output on the calibration text.",
        "- SmolLM2's 16-bit weights were restored from a 4-bit file with groups of 32 (Q4_1). They are what 16 bits means here.",
        f"- torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}.",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: list[dict[str, Any]], bits: int, method: str, calibration: str, other: str) -> list[str]:
    cells = [one for one in cells if (one["bits"], one["method"]) == (bits, method)]
    cells = [one for one in cells if one["calibration"] in (calibration, None)]
    if not cells:
        return []
    hidden = [one["hidden_error"] for one in cells if one["hidden_error"] is not None]
    texts = [
        str(bits),
        method,
        "-" if method == "RTN" else str(len(cells)),
        f"{cells[0]['layer_bits']:.3f}",
        f"{cells[0]['layer_bytes'] / 1e6:.2f}",
        f"{cells[0]['file_bytes'] / 1e6:.1f}",
        _mean([one["wikitext2"] for one in cells]),
        _mean([one[other] for one in cells]),
        f"{statistics.mean(hidden):.3f}" if hidden else "-",
    ]
    return [f"| {' | '.join(texts)} |"]


def _comparisons(cells: list[dict[str, Any]]) -> list[str]:
    lines = []
    for bits in sorted({cell["bits"] for cell in cells} - {16}):
        for calibration in OTHER:
            for pair in BARS:
                here = [one for one in cells if (one["bits"], one["calibration"]) == (bits, calibration)]
                first, second = (
                    {one["seed"]: one["wikitext2"] for one in here if one["method"] == name} for name in pair
                )
                if seeds := sorted(first.keys() & second.keys()):
                    means = [statistics.mean(one[seed] for seed in seeds) for one in (first, second)]
                    sizes = [next(one["layer_bytes"] for one in here if one["method"] == name) for name in pair]
                    wins = sum(first[seed] < second[seed] for seed in seeds)
                    lines.append(
                        f"- {bits} bits, {calibration}: {pair[0]} {means[0]:.2f} {'<' if means[0] < means[1] else '>='} "
                        f"{pair[1]} {means[1]:.2f}; lower in {wins} of {len(seeds)} seeds, with {100 * (sizes[0] / sizes[1] - 1):+.1f} % bytes in the layers."
                    )
    return lines


def _mean(values: list[float]) -> str:
    mean = statistics.mean(values)
    if mean >= 1e4:
        return f"{mean:.1e}"
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
