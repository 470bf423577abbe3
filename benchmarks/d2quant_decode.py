"""Greedy decoding end to end: D²Quant at 2, 3 and 4 bits against the same model in bfloat16 and float32.

    python benchmarks/d2quant_decode.py MODEL_FOLDER

writes `benchmarks/results/d2quant_decode.json` and the table `d2quant_decode.md` beside it. A cell is measured as in `ptqtp_decode.py`,
in a process of its own, and the cells take turns. The models are those of the default pipeline, rotated and with corrections as
biases; the calibration text is short, which changes no speed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from ptqtp_decode import NEW_TOKENS, PLAIN, PROMPT_TOKENS, RESULTS, run


ROUNDS = 3
CALIBRATION = "--method d2quant --dataset tiny:math --num-samples 2 --seqlen 64 --json".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal language model in 16 bits, of Llama's kind")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--keep", type=Path, help="folder in which the quantized models are, or are to be kept")
    parser.set_defaults(llama=None, gguf=None)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        cells = {dtype: (args.model, dtype) for dtype in PLAIN}
        for bits in (2, 3, 4):
            folder = (args.keep or Path(scratch)) / f"{bits}-bits"
            if not folder.exists():
                command = [sys.executable, "-m", "hf_rb.cli", "quantize", args.model, folder, "--bits", str(bits)]
                subprocess.run([*command, *CALIBRATION], check=True, stdout=subprocess.DEVNULL)
            cells[f"D²Quant, {bits} bits"] = (folder, "bfloat16")
        rows = []
        for threads in args.threads:
            found: dict[str, list[dict]] = {name: [] for name in cells}
            for _ in range(ROUNDS):
                for name, (folder, dtype) in cells.items():
                    found[name].append(run(args, folder, dtype, "None", threads))
                    print(name, found[name][-1], flush=True)
            rows += [{"name": name, "threads": threads} | summary(runs) for name, runs in found.items()]
    environment = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    result = {"model": args.model.resolve().name, "rows": rows, "environment": environment}
    (RESULTS / "d2quant_decode.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "d2quant_decode.md").write_text(render(result), encoding="utf-8")


def summary(runs: list[dict]) -> dict:
    """The medians over the rounds, and the whole spread of a rate between rounds."""
    rates = [one["tokens_per_processor_second"] for one in runs]
    keys = "tokens_per_second", "tokens_per_processor_second", "peak_growth", "file_bytes"
    return {key: median(one[key] for one in runs) for key in keys} | {
        "spread": (max(rates) - min(rates)) / median(rates)
    }


def render(result: dict) -> str:
    """The table in Markdown."""
    lines = [
        f"# Decoding {result['model']} on a CPU with D²Quant",
        "",
        f"Greedy decoding of {NEW_TOKENS} tokens behind a prompt of {PROMPT_TOKENS}, one sequence, every cell in a process of its own: "
        f"medians of {ROUNDS} rounds in which the cells take turns, with half the spread between rounds. Tokens in a second of the "
        "processor's time, which other work on the machine changes less than those in a second. Embeddings, head and norms are in bfloat16 where "
        "nothing else is said.",
        "",
        "| model | threads | tokens/processor s | over 16/32 bits | tokens/s | model's memory, MB | file, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        plain = [one for one in result["rows"] if one["name"] in PLAIN and one["threads"] == row["threads"]]
        rate = row["tokens_per_processor_second"]
        ratio = rate / max(one["tokens_per_processor_second"] for one in plain)
        lines.append(
            f"| {row['name']} | {row['threads']} | {rate:.1f} ±{row['spread'] / 2:.0%} | {ratio:.2f} | {row['tokens_per_second']:.1f} | "
            f"{row['peak_growth'] / 1e6:.0f} | {row['file_bytes'] / 1e6:.0f} |"
        )
    environment = result["environment"]
    lines += [
        "",
        "- `over 16/32 bits` divides by the faster of the two unquantized models. Memory is the growth of the process's peak since the "
        "libraries were imported. Files have a head beside the embeddings, which rotation unties.",
        f"- {environment['machine']}, {environment['cores']} cores, load average at the end {environment['load']:.1f}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
