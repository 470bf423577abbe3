"""Recovery after quantization: how much of what was lost comes back, over seeds, objectives and budgets.

    python benchmarks/recover.py tiny                     # exact match of the embedded teacher
    python benchmarks/recover.py text MODEL TEXT_FILE     # perplexity of a model on held-out text

writes `benchmarks/results/recover_tiny.json` or `recover_text.json`, and a table beside it. Each seed is `hf-rb recover` in a process of its own, in one
folder a model, so that what does not depend on the seed is done once. The text is cut in two: windows of its first half are trained on, and the
perplexity is that of the beginning of its second half.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean


RESULTS = Path(__file__).parent / "results"
D2QUANT = {"quant_method": "d2quant", "bits": 2}
CALIBRATED = D2QUANT | {"dataset": "tiny:math", "num_samples": 32, "seqlen": 256, "batch_size": 8}
TRAIN_TEXT = "{train_text}"  # the file that is trained on
TINY = {
    "model_name_or_path": "tiny:teacher",
    "task": "tiny:math",
    "eval_problems": 300,
    "pool_problems": 500,
    "max_new_tokens": 96,
    "eval_batch_size": 128,
    "lora_r": 8,
    "lora_alpha": 16,
    "training": {"learning_rate": 2e-3, "num_train_epochs": 2, "per_device_train_batch_size": 16},
    "dtype": "float32",
}
TEXT = {
    "text_tokens": 128,
    "lora_r": 16,
    "lora_alpha": 32,
    "training": {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4},
    "dtype": "float32",
}
CELLS = {
    "tiny": {
        "PTQTP, 1 plane": {"quantization_config": {"quant_method": "ptqtp", "planes": 1}, "baseline": True},
        # It loses so little that it takes many problems to see it, a large pool to find what broke, and a lower rate.
        "D²Quant, 2 bits": {
            "quantization_config": CALIBRATED,
            "eval_problems": 1500,
            "pool_problems": 6000,
            "examples": [545],
            "training": TINY["training"] | {"learning_rate": 1e-3},
        },
        "D²Quant, 2 bits, without data": {"quantization_config": D2QUANT | {"backend": "rtn"}, "eval_problems": 500},
    },
    "text": {
        "PTQTP, 2 planes": {"quantization_config": {"quant_method": "ptqtp"}, "baseline": True},
        # Without rotation, which would store the tied embeddings twice.
        "D²Quant, 2 bits": {
            "quantization_config": D2QUANT | {"dataset": TRAIN_TEXT, "num_samples": 16, "seqlen": 512, "rotate": False}
        },
    },
}
HELD_OUT = 12_000  # letters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(CELLS))
    parser.add_argument("model", nargs="?", help="text: folder of a model")
    parser.add_argument("text", nargs="?", type=Path, help="text: a text file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["forward_kl"], help="of the first seed also: akl hpd sft")
    parser.add_argument("--examples", type=int, nargs="+", help="budgets (default 332; text: 64)")
    parser.add_argument("--only", nargs="+", help="models of the table")
    parser.add_argument(
        "--folder", type=Path, help="where to work, and go on after an interruption (default: a new one)"
    )
    args = parser.parse_args()
    path = RESULTS / f"recover_{args.kind}.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if args.only and path.is_file() else {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        scratch = args.folder or Path(scratch)
        common = TINY if args.kind == "tiny" else TEXT | split(args, scratch)
        common |= {"examples": args.examples or [332 if args.kind == "tiny" else 64]}
        for number, (name, own) in enumerate(CELLS[args.kind].items()):
            if args.only and name not in args.only:
                continue
            cells[name] = []
            for seed in args.seeds:
                # The other objectives are of the first seed alone, and the baseline of the last.
                baseline = seed == args.seeds[-1] and own.get("baseline", False)
                objectives = args.objectives if seed == args.seeds[0] else args.objectives[:1]
                cells[name].append(run(common | own | {"baseline": baseline}, seed, objectives, scratch / str(number)))
                result = {"kind": args.kind, "load": os.getloadavg()[0], "cells": cells}
                path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                path.with_suffix(".md").write_text(render(result), encoding="utf-8")
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def split(args: argparse.Namespace, scratch: Path) -> dict:
    text = args.text.read_text(encoding="utf-8")
    middle = text.index("\n", len(text) // 2)
    parts = {"train_text": text[:middle], "eval_text": text[middle : middle + HELD_OUT]}
    seen = {line.strip() for line in parts["train_text"].splitlines()}
    parts["eval_text"] = "\n".join(line for line in parts["eval_text"].splitlines() if line.strip() not in seen)
    for name, part in parts.items():
        (scratch / f"{name}.txt").write_text(part, encoding="utf-8")
    return {"model_name_or_path": args.model} | {name: str(scratch / f"{name}.txt") for name in parts}


def run(recipe: dict, seed: int, objectives: list[str], folder: Path) -> dict:
    """Runs a recipe and returns its report, with the processor time of the run."""
    import yaml

    path = folder.with_suffix(".yaml")
    recipe = recipe | {"seed": seed, "objectives": objectives, "output_dir": str(folder)}
    written = yaml.safe_dump(recipe).replace(TRAIN_TEXT, recipe.get("train_text", ""))
    path.write_text(written, encoding="utf-8")
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "hf_rb.cli", "recover", str(path)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"seed {seed} of {folder} has failed")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report | {
        "seed": seed,
        "processor_s": usage.ru_utime + usage.ru_stime,
        "clock_s": time.monotonic() - started,
    }


def render(result: dict) -> str:
    lines = [
        "| model | trained with | seeds | bytes | exact match | regained | perplexity | training, s | first run in all, s of processor |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, runs in result["cells"].items():
        keys = list(
            dict.fromkeys((row["model"], row["objective"], row["examples"]) for one in runs for row in one["rows"])
        )
        for key in keys:
            rows = [
                row for one in runs for row in one["rows"] if (row["model"], row["objective"], row["examples"]) == key
            ]
            rows = rows if key[1] else rows[:1]
            title = key[0] if key[0] != "full precision" else f"full precision ({name})"
            broken = f" ({rows[0]['failing']} broken)" if rows[0]["failing"] else ""
            trained = f"{key[1]}, {key[2]}{broken}" if key[1] else "-"
            seconds = runs[0]["processor_s"] if key[1] and rows[0] in runs[0]["rows"] else None
            whole = "-" if seconds is None else f"{seconds:.0f}"
            lines.append(
                f"| {title} | {trained} | {len(rows) if key[1] else '-'} | {rows[0]['bytes']:,} | {spread(rows, 'exact_match', '.1%')} | "
                f"{spread(rows, 'regained', '.0%')} | {spread(rows, 'perplexity', '.4g')} | {spread(rows, 'seconds', '.0f')} | {whole} |"
            )
        lines += [f"| {note} " + "| " * 8 + "|" for note in runs[0]["notes"]]
    lines += [
        "",
        *(f"{name}: of the pool {one[0]['failures']}" for name, one in result["cells"].items() if one[0]["failures"]),
    ]
    return "\n".join(lines) + "\n"


def spread(rows: list[dict], key: str, form: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return format(values[0], form)
    return f"{format(mean(values), form)} ({format(min(values), form)} to {format(max(values), form)})"


if __name__ == "__main__":
    main()
