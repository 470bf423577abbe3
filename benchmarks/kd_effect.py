"""What the distillation objectives do on small models.

    python benchmarks/kd_effect.py tiny
    python benchmarks/kd_effect.py stories MODEL_FOLDER TEXT_FILE

`tiny` trains the embedded student with every objective for equal steps and reports exact match and perplexity on held-out problems,
mean and range over the seeds. `stories` cuts a small Llama (stories260k) from five layers to three, distils it from the whole model
for a number of seconds and reports cross-entropy on held-out text. Both write JSON and a table to `benchmarks/results`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch


RESULTS = Path(__file__).parent / "results"
CPU = dict(
    use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True
)

# The gradient of the sampled-token objective is far noisier than that of a divergence, so it takes smaller steps.
ON_POLICY = dict(objective="gopd", lmbda=1.0, temperature=1.0, max_new_tokens=96, learning_rate=1e-4)

# Name in the table -> (config's name, its fields).
OBJECTIVES = {
    "SFT": ("SFTConfig", {}),
    "forward_kl": ("GKDConfig", dict(objective="forward_kl", lmbda=0.0)),
    "akl": ("GKDConfig", dict(objective="akl", lmbda=0.0)),
    "hpd": ("GKDConfig", dict(objective="hpd", lmbda=0.0)),
    "gopd, scale 1": ("GKDConfig", ON_POLICY),
    "gopd, scale 1.25": ("GKDConfig", ON_POLICY | dict(reward_scale=1.25)),
    "gopd, scale 1.25, full vocabulary": ("GKDConfig", ON_POLICY | dict(reward_scale=1.25, gopd_full_vocab=True)),
}


def tiny_run(name: str, seed: int, steps: int, batch_size: int, problems: int, learning_rate: float) -> dict:
    """Trains and evaluates one student."""
    import hf_rb
    from hf_rb import tiny

    config_name, fields = OBJECTIVES[name]
    fields = {"learning_rate": learning_rate} | fields
    trainer_name = config_name.replace("Config", "Trainer")
    data = tiny.load_dataset("math", config="prompt_completion", size=steps * batch_size, seed=1000 + seed)
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(hf_rb, config_name)(
            folder, max_steps=steps, per_device_train_batch_size=batch_size, warmup_steps=10,
            lr_scheduler_type="cosine", max_length=256, logging_steps=steps, seed=seed, **CPU, **fields,
        )  # fmt: skip
        teacher = {} if config_name == "SFTConfig" else {"teacher_model": str(tiny.path("teacher"))}
        trainer = getattr(hf_rb, trainer_name)(
            str(tiny.path("student")),
            args=args,
            train_dataset=data.select_columns(["prompt", "completion"]),
            **teacher,
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    return {"objective": name, "seed": seed, "cpu_seconds": seconds, **_measure(model, tokenizer, problems)}


def _measure(model, tokenizer, problems: int) -> dict:
    from hf_rb import evaluation

    tokenizer.padding_side = "left"
    rows = evaluation.load_task("tiny:math", problems)
    texts, contexts = evaluation.solutions(tokenizer, rows)
    return {
        "exact_match": evaluation.exact_match(model, tokenizer, rows, max_new_tokens=96).accuracy,
        "perplexity": evaluation.perplexity(model, tokenizer, texts, contexts=contexts, batch_size=32).perplexity,
    }


def tiny_effect(args: argparse.Namespace) -> None:
    from hf_rb import evaluation, tiny

    model, tokenizer = evaluation.load_model(tiny.path("student"), "float32")
    runs = [
        {
            "objective": "student at the start",
            "seed": 0,
            "cpu_seconds": 0.0,
            **_measure(model, tokenizer, args.problems),
        }
    ]
    for seed in range(args.seeds):
        for name in OBJECTIVES:
            runs.append(tiny_run(name, seed, args.steps, args.batch_size, args.problems, args.learning_rate))
            print(runs[-1], flush=True)
    lines = [
        "# Distillation objectives on the tiny family",
        "",
        f"{args.steps} steps of {args.batch_size} problems at a peak learning rate of {args.learning_rate} (gopd {ON_POLICY['learning_rate']}), {args.seeds} seeds; greedy exact match on "
        f"{args.problems} held-out problems and perplexity of their worked solutions: mean (lowest to highest). An effect on a tiny model, which "
        "says little about large ones. `python benchmarks/kd_effect.py tiny` repeats it.",
        "",
        "| objective | exact match | perplexity | CPU seconds |",
        "|---|---:|---:|---:|",
    ]
    for name in dict.fromkeys(run["objective"] for run in runs):
        cells = [
            [run[key] for run in runs if run["objective"] == name]
            for key in ("exact_match", "perplexity", "cpu_seconds")
        ]
        shown = [f"{mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in cells[:2]] + [f"{mean(cells[2]):.0f}"]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    _write("kd_effect_tiny", {"arguments": vars(args), "runs": runs}, lines)


def stories(args: argparse.Namespace) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from hf_rb import GKDConfig, GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    student.model.layers = student.model.layers[: args.layers]
    student.config.num_hidden_layers = args.layers
    ids = tokenizer(Path(args.text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    rows = [ids[start : start + args.window] for start in range(0, len(ids) - args.window, args.window)]
    held_out, rows = rows[:40], rows[40:]

    def cross_entropy() -> float:
        batch = torch.tensor(held_out)
        with torch.no_grad():
            return student.eval()(input_ids=batch, labels=batch).loss.item()

    class Stop(TrainerCallback):
        def on_step_end(self, args_, state, control, **kwargs):
            control.should_training_stop = time.perf_counter() - start > args.seconds

    before = cross_entropy()
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            folder, objective="forward_kl", lmbda=0.0, max_steps=args.steps, per_device_train_batch_size=16, learning_rate=3e-3,
            lr_scheduler_type="cosine", warmup_steps=20, logging_steps=100, max_length=args.window, **CPU,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        trainer = GKDTrainer(
            student, teacher, config, train_dataset=data, processing_class=tokenizer, callbacks=[Stop()]
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    result = {"before": before, "after": cross_entropy(), "seconds": seconds, "steps": trainer.state.global_step}
    lines = [
        f"# {Path(args.model).name} cut to {args.layers} layers and distilled from the whole model",
        "",
        f"Cross-entropy on held-out text: {before:.2f} before, {result['after']:.2f} after {result['steps']} steps in {seconds:.0f} s "
        f"on {torch.get_num_threads()} thread(s). `python benchmarks/kd_effect.py stories MODEL TEXT` repeats it.",
    ]
    _write("kd_effect_stories", result, lines)


def _write(name: str, data: dict, lines: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    data.get("arguments", {}).pop("run", None)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("tiny")
    part.add_argument("--steps", type=int, default=120)
    part.add_argument("--batch_size", type=int, default=32)
    part.add_argument("--seeds", type=int, default=3)
    part.add_argument("--problems", type=int, default=300)
    part.add_argument("--learning_rate", type=float, default=1e-3)
    part.set_defaults(run=tiny_effect)
    part = parts.add_parser("stories")
    part.add_argument("model")
    part.add_argument("text")
    part.add_argument("--layers", type=int, default=3)
    part.add_argument("--seconds", type=float, default=60)
    part.add_argument("--steps", type=int, default=600)
    part.add_argument("--window", type=int, default=256)
    part.set_defaults(run=stories)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
