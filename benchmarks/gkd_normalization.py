"""Two faults of TRL's experimental GKDTrainer, and ours beside it: `python benchmarks/gkd_normalization.py`.

The embedded student and teacher, one SGD step on four rows. Off-policy: the gradient's norm with one process and with two that
share the same rows (it should not change). On-policy: what the loss is divided by, against the tokens that were generated.
Writes `benchmarks/results/gkd_normalization.json` and `.md`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


RESULTS = Path(__file__).parent / "results"


def run_cell(who: str, lmbda: float) -> dict:
    """One training step in this process, or in one of several that torchrun has started."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig as TrlConfig
    from trl.experimental.gkd import GKDTrainer as TrlTrainer

    import hf_rb
    from hf_rb import tiny

    config_class, base = (hf_rb.GKDConfig, hf_rb.GKDTrainer) if who == "hf_rb" else (TrlConfig, TrlTrainer)
    seen = {}

    class Trainer(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen["divided_by"] = int(num_items_in_batch)
            seen["trained"] = int((inputs["labels"][:, 1:] != -100).sum())
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    world = int(os.environ.get("WORLD_SIZE", 1))
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            folder, max_steps=1, per_device_train_batch_size=4 // world, lmbda=lmbda, beta=0.5, max_new_tokens=32, optim="sgd",
            max_grad_norm=1e9, logging_steps=1, seed=0, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True, max_length=256,
        )  # fmt: skip
        student = AutoModelForCausalLM.from_pretrained(tiny.path("student"), dtype="float32")
        teacher = AutoModelForCausalLM.from_pretrained(tiny.path("teacher"), dtype="float32")
        data = tiny.load_dataset("math", config="messages", size=4).select_columns(["messages"])
        tokenizer = AutoTokenizer.from_pretrained(tiny.path("student"))
        trainer = Trainer(student, teacher, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    return {
        **seen,
        "grad_norm": next(float(log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log),
    }


def _spawn(who: str, lmbda: float, processes: int) -> dict:
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, "-W", "ignore", *launch, __file__, "--cell", who, str(lmbda)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    cells = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("CELL ")]
    if not cells:
        raise RuntimeError(done.stderr[-2000:])
    return cells[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print("CELL " + json.dumps(run_cell(args.cell[0], float(args.cell[1]))), flush=True)
        return
    results = {
        who: {"one": _spawn(who, 0.0, 1), "two": _spawn(who, 0.0, 2), "on_policy": _spawn(who, 1.0, 1)}
        for who in ("trl", "hf_rb")
    }
    lines = [
        "# Normalisation of GKD",
        "",
        "| trainer | gradient norm, one process | two processes, same rows | on-policy: loss divided by | tokens generated |",
        "|---|---:|---:|---:|---:|",
    ]
    for who, cells in results.items():
        norms = [f"{cells[key]['grad_norm']:.5f}" for key in ("one", "two")]
        counts = [str(cells["on_policy"][key]) for key in ("divided_by", "trained")]
        lines.append(f"| {who} | {' | '.join([*norms, *counts])} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gkd_normalization.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "gkd_normalization.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
