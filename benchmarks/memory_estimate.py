"""What `hf-rb check` estimates against what a run takes: `python benchmarks/memory_estimate.py MODEL_FOLDER`.

One case is two optimizer steps of a recipe on a CPU in a fresh process, with rows that fill `max_length`. Measured is the highest
resident memory of the training loop minus that after the imports; the estimate is `hf-rb check`'s for the same recipe. The model is
its own teacher. Writes `benchmarks/results/memory_estimate.json` and `.md`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


RESULTS = Path(__file__).parent / "results"
BAR = 0.25
SHORT = {"per_device_train_batch_size": 2, "max_length": 256, "gradient_checkpointing": False}
LONG = {"per_device_train_batch_size": 2, "max_length": 512, "gradient_checkpointing": True}
LORA = {"use_peft": True, "lora_target_modules": ["all-linear"]}
GKD = {"objective": "forward_kl", "lmbda": 0.0}
CASES = {
    "SFT full": ("sft", SHORT),
    "SFT full, checkpointing": ("sft", LONG),
    "SFT full, accumulation": ("sft", SHORT | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    "SFT LoRA": ("sft", SHORT | LORA),
    "SFT LoRA, checkpointing": ("sft", LONG | LORA),
    "GKD": ("gkd", SHORT | GKD),
    "GKD, checkpointing": ("gkd", LONG | GKD),
    "GKD LoRA": ("gkd", SHORT | GKD | LORA),
}


def write_recipe(folder: Path, model: str, verb: str, changes: dict) -> Path:
    """Writes a recipe and data whose rows are longer than `max_length`."""
    import yaml

    from hf_rb.tiny.problems import generate

    problems = [f"{problem.question} {problem.solution}" for problem in generate("train", 400, 0)]
    with (folder / "data.jsonl").open("w") as file:
        for start in range(0, 400, 25):
            turn = {"role": "assistant", "content": " ".join(problems[start : start + 25])}
            file.write(json.dumps({"messages": [{"role": "user", "content": "Go on."}, turn]}) + "\n")
    recipe = {
        "model_name_or_path": model,
        "datasets": [{"path": "json", "data_files": str(folder / "data.jsonl"), "split": "train"}],
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    recipe |= {"teacher_model_name_or_path": model} if verb == "gkd" else {}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def run_case(verb: str, recipe: str) -> int:
    """Trains in this process and returns the extra resident memory at its highest, in bytes."""
    from importlib import import_module

    script = import_module(f"hf_rb.scripts.{verb}")
    before = _status("VmRSS")
    trainer = script.build(*script.prepare(["--config", recipe]))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    trainer.train()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024


def measure(model: str, name: str) -> dict:
    verb, changes = CASES[name]
    with TemporaryDirectory() as folder:
        recipe = str(write_recipe(Path(folder), model, verb, changes))
        check = [sys.executable, "-m", "hf_rb.cli", "check", recipe, "--for", verb, "--json"]
        plan = json.loads(subprocess.run(check, capture_output=True, text=True, check=True).stdout)[0]["plan"]
        case = [sys.executable, __file__, model, "--case", verb, recipe]
        done = subprocess.run(case, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    measured = int(done.stdout.splitlines()[-1])
    return {
        "case": name,
        "estimate": plan["peak"],
        "measured": measured,
        "memory": plan["memory"],
        "largest": plan["largest"],
    }


def render(model: str, cells: list[dict]) -> str:
    lines = [
        "# Memory: estimate of `hf-rb check` and a run",
        "",
        f"{model} in float32 on a CPU, two optimizer steps. Measured is peak RSS minus RSS after the imports; the bar is 25 %.",
        "`python benchmarks/memory_estimate.py MODEL_FOLDER` repeats it.",
        "",
        "| run | estimate MB | measured MB | estimate / measured | largest part | |",
        "|---|---:|---:|---:|---|---|",
    ]
    for cell in cells:
        ratio = cell["estimate"] / cell["measured"]
        met = "met" if abs(ratio - 1) <= BAR else "**missed**"
        lines.append(
            f"| {cell['case']} | {cell['estimate'] / 1e6:.0f} | {cell['measured'] / 1e6:.0f} | {ratio:.2f} | {cell['largest']} | {met} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL_FOLDER")
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="NAME")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(run_case(*args.case))
        return
    cells = []
    for name in args.cases:
        cells.append(measure(args.model, name))
        print(
            f"{name:24} {cells[-1]['estimate'] / 1e6:8.0f} MB estimated {cells[-1]['measured'] / 1e6:8.0f} MB measured",
            flush=True,
        )
    name = Path(args.model).name
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory_estimate.json").write_text(json.dumps({"model": name, "cells": cells}, indent=2) + "\n")
    (RESULTS / "memory_estimate.md").write_text(render(name, cells))
    print("\n" + render(name, cells))


if __name__ == "__main__":
    main()
