"""What `hf-rb check` estimates against what a run takes: `python benchmarks/memory_estimate.py MODEL_FOLDER --mixture MIXTURE_FOLDER`.

One case is two optimizer steps of a recipe on a CPU in a fresh process, with rows that fill `max_length`, or `hf-rb audit` of one batch.
Measured is the highest resident memory of the whole process, loading included; the estimate is `hf-rb check`'s for the same recipe. The
model is its own teacher unless the mixture is, which `hf-rb upcycle MODEL_FOLDER MIXTURE_FOLDER --mpi --experts 4` makes of it. Writes `benchmarks/results/memory_estimate.json` and `.md`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_rb.cli.check.plan import Plan

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
TINY = SHORT | {"max_length": 64}
# Student and teacher: "model" or "mixture", or an embedded model.
MIXTURES = {
    "tiny:student, SFT full": ("sft", TINY, "tiny:student", None),
    "tiny:moe, SFT full": ("sft", TINY, "tiny:moe", None),
    "mixture, SFT LoRA, 64 tokens": ("sft", TINY | LORA | {"per_device_train_batch_size": 1}, "mixture", None),
    "mixture, SFT LoRA": ("sft", SHORT | LORA, "mixture", None),
    "mixture, SFT LoRA, checkpointing": ("sft", LONG | LORA, "mixture", None),
    "mixture, SFT full": ("sft", SHORT, "mixture", None),
    "mixture, SFT LoRA, bfloat16": ("sft", SHORT | LORA | {"dtype": "bfloat16"}, "mixture", None),
    "GKD LoRA from the mixture": ("gkd", SHORT | GKD | LORA, "model", "mixture"),
    "audit of GKD LoRA from the mixture": ("audit", SHORT | GKD | LORA | {"max_length": 96}, "model", "mixture"),
}
CASES = {name: (*case, "model", "model") for name, case in CASES.items()} | MIXTURES
AUDIT = ["--batches", "1", "--batch_size", "1"]


def write_recipe(folder: Path, model: str, teacher: str, verb: str, changes: dict) -> Path:
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
    recipe |= {"teacher_model_name_or_path": teacher} if verb != "sft" else {}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def run_case(verb: str, recipe: str) -> int:
    """Trains or audits in this process and returns its resident memory at its highest, in bytes."""
    from importlib import import_module

    if verb == "audit":
        from hf_rb.cli import main as hf_rb

        hf_rb(["audit", "--config", recipe, *AUDIT])
    else:
        script = import_module(f"hf_rb.scripts.{verb}")
        script.build(*script.prepare(["--config", recipe])).train()
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024


def measure(folders: dict[str, str], name: str) -> dict:
    verb, changes, student, teacher = CASES[name]
    with TemporaryDirectory() as folder:
        models = folders.get(student, student), folders.get(teacher, teacher)
        recipe = str(write_recipe(Path(folder), *models, verb, changes))
        plan = estimated(recipe, verb)
        case = [sys.executable, __file__, folders["model"], "--case", verb, recipe]
        done = subprocess.run(case, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    measured = int(done.stdout.splitlines()[-1])
    return {
        "case": name,
        "estimate": plan.peak,
        "measured": measured,
        "memory": plan.memory,
        "largest": plan.largest,
    }


def estimated(recipe: str, verb: str) -> "Plan":
    from hf_rb.cli.audit import make_small
    from hf_rb.cli.check import check, read_recipe

    values = read_recipe(Path(recipe))
    if verb != "audit":
        return check(Path(recipe), values, verb).plan
    make_small(values, "gkd", batch_size=1, max_new_tokens=64)
    return check(Path(recipe), values, "gkd").plan.audit()


def render(model: str, cells: list[dict]) -> str:
    lines = [
        "# Memory: estimate of `hf-rb check` and a run",
        "",
        f"{model} in float32 on a CPU, two optimizer steps, and a mixture of four experts made of it. Measured is the peak RSS of the "
        "whole process; the bar is 25 %. `python benchmarks/memory_estimate.py MODEL_FOLDER --mixture MIXTURE_FOLDER` repeats it.",
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
    parser.add_argument("--mixture", metavar="MIXTURE_FOLDER", help="without it the cases of mixtures are left out")
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="NAME")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(run_case(*args.case))
        return
    cells = []
    for name in args.cases:
        if "mixture" in CASES[name] and not args.mixture:
            continue
        cells.append(measure({"model": args.model, "mixture": args.mixture}, name))
        print(
            f"{name:36} {cells[-1]['estimate'] / 1e6:8.0f} MB estimated {cells[-1]['measured'] / 1e6:8.0f} MB measured",
            flush=True,
        )
    name = Path(args.model).name
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory_estimate.json").write_text(json.dumps({"model": name, "cells": cells}, indent=2) + "\n")
    (RESULTS / "memory_estimate.md").write_text(render(name, cells))
    print("\n" + render(name, cells))


if __name__ == "__main__":
    main()
