"""GRPO against GRPO + EDAS on the tiny family: `python benchmarks/edas_effect.py`. Needs matplotlib.

The embedded student learns word problems by an exact-answer reward, for equal steps on the same problems, once for every seed.
Reported over time: the reward of the sampled completions, the number of distinct wrong answers in a group, and greedy exact match on
held-out problems. GRPO is EDAS with α = β = 0, which changes no advantage (checked), so that both count wrong answers alike.

An effect on a tiny model, as it comes out; it says little about large ones. Writes `benchmarks/results/edas_effect.json`, `.md` and
`.png`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

import torch
from transformers import TrainerCallback


RESULTS = Path(__file__).parent / "results"
METHODS = {"GRPO": {"edas_alpha": 0.0, "edas_beta": 0.0}, "GRPO + EDAS": {}}
CURVES = {
    "reward": "reward",
    "wrong answers": "shaping/edas/classes_per_group",
    "exact match": "exact_match",
}


class ExactMatch(TrainerCallback):
    """Measures greedy exact match on held-out problems every few steps."""

    def __init__(self, problems: int, every: int):
        from hf_rb import evaluation

        self.rows, self.every, self.found = evaluation.load_task("tiny:math", problems), every, []

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.global_step == 1 or state.global_step % self.every == 0:
            from hf_rb import evaluation

            random_state = torch.get_rng_state()
            training, _ = model.training, model.eval()
            accuracy = evaluation.exact_match(model, processing_class, self.rows, max_new_tokens=96).accuracy
            model.train(training)
            torch.set_rng_state(random_state)
            self.found.append({"step": state.global_step, "exact_match": accuracy})


def run(method: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains one student; returns its curves as `{name: [(step, value), ...]}`."""
    from hf_rb import GRPOConfig, GRPOTrainer, tiny
    from hf_rb.rl.rewards import build_reward

    prompts = args.batch_size // args.group
    data = tiny.load_dataset("math", "prompt_only", size=args.steps * prompts, seed=1000 + seed)
    callback = ExactMatch(args.problems, args.every)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, advantage_shapers=["edas"], correct_reward="exact_answer_reward", answer_extractor="hashes",
            num_generations=args.group, per_device_train_batch_size=args.batch_size, max_completion_length=96,
            max_steps=args.steps, learning_rate=args.learning_rate, lr_scheduler_type="constant", epsilon_high=0.28, seed=seed,
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
            disable_tqdm=True, **METHODS[method],
        )  # fmt: skip
        reward = build_reward("exact_answer_reward", "hashes")
        trainer = GRPOTrainer(str(tiny.path("student")), reward, config, data, callbacks=[callback])
        trainer.train()
    log = trainer.state.log_history[:-1]
    if method == "GRPO" and any(entry["shaping/edas/changed"] for entry in log):
        raise RuntimeError("EDAS with alpha = beta = 0 has changed an advantage.")
    curves = {
        name: [(entry["step"], entry[key]) for entry in (callback.found if key == "exact_match" else log)]
        for name, key in CURVES.items()
    }
    return {"method": method, "seed": seed, "curves": curves}


def smooth(curve: list, width: int) -> tuple[list, list]:
    """Means over windows of `width` points."""
    parts = [curve[start : start + width] for start in range(0, len(curve), width)]
    return [part[-1][0] for part in parts], [mean(value for _, value in part) for part in parts]


def plot(runs: list[dict], every: int) -> None:
    """One panel a curve: thin lines for seeds, a thick one for their mean."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.2), layout="constrained")
    for panel, name in zip(panels, CURVES, strict=True):
        for colour, method in zip(("tab:gray", "tab:blue"), METHODS, strict=True):
            lines = [
                smooth(run["curves"][name], 1 if name == "exact match" else every)
                for run in runs
                if run["method"] == method
            ]
            for steps, values in lines:
                panel.plot(steps, values, color=colour, linewidth=0.6, alpha=0.5)
            means = [mean(column) for column in zip(*(values for _, values in lines), strict=True)]
            panel.plot(lines[0][0], means, color=colour, linewidth=2, label=method)
        panel.set(title=name, xlabel="step")
    panels[0].legend()
    figure.savefig(RESULTS / "edas_effect.png", dpi=120)


def table(runs: list[dict], args: argparse.Namespace) -> str:
    """Means and ranges over the seeds at the end of training."""
    lines = [
        "# GRPO against GRPO + EDAS on the tiny family",
        "",
        f"{args.steps} steps of {args.batch_size} completions, {args.group} a prompt, learning rate {args.learning_rate}, {args.seeds} "
        f"seeds: means over the last {args.every} steps, lowest to highest seed; greedy exact match on {args.problems} held-out "
        "problems. An effect on a tiny model, which says little about large ones.",
        "",
        f"| method | {' | '.join(CURVES)} |",
        f"|---|{'---:|' * len(CURVES)}",
    ]
    for method in METHODS:
        cells = []
        for name in CURVES:
            last = 1 if name == "exact match" else args.every
            ends = [mean(value for _, value in run["curves"][name][-last:]) for run in runs if run["method"] == method]
            cells.append(f"{mean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![over time](edas_effect.png)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64, help="completions a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--problems", type=int, default=100, help="held-out problems")
    parser.add_argument("--every", type=int, default=20, help="steps between measurements, and of a mean")
    args = parser.parse_args()
    import matplotlib  # before hours of training, not after

    matplotlib.use("agg")
    RESULTS.mkdir(exist_ok=True)
    runs = []
    for seed in range(args.seeds):
        for method in METHODS:
            runs.append(run(method, seed, args))
            print(method, seed, {name: curve[-1] for name, curve in runs[-1]["curves"].items()}, flush=True)
            found = {"arguments": vars(args), "runs": runs}
            (RESULTS / "edas_effect.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(runs, args)
    (RESULTS / "edas_effect.md").write_text(text)
    plot(runs, args.every)
    print(text)


if __name__ == "__main__":
    main()
