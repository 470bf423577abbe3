"""What advantage shapers cost: `python benchmarks/rl_overhead.py`.

Processor seconds of the shapers (context, pipeline, columns) as a share of those of a training step, at 16 completions of 1,024 tokens
for a prompt, with the embedded student; the bar is 1 %. The completions are given, not sampled: a real step is longer, and the share
smaller. A judge, a model elsewhere, costs nothing here. What `math-verify` adds to EDAS is reported for a
group whose answers have not been seen before.

Writes `benchmarks/results/rl_overhead.json` and `.md`.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import torch


RESULTS = Path(__file__).parent / "results"
RUBRIC = "\n".join(["<SUGGEST> adds"] * 5 + ["<PITFALL> forgets", "<BONUS> checks"])
PIPELINES = {
    "edas": {"advantage_shapers": ["edas"]},
    "calibadv": {"advantage_shapers": ["calibadv"]},
    "srar": {"advantage_shapers": ["srar"]},
    "edas, calibadv, srar": {"advantage_shapers": ["edas", "calibadv", "srar"]},
}
LATEX = [r"\frac{%d}{7}", r"%d\sqrt{2}", "%d.5", r"(%d, \infty)", "x = %d", r"\{%d, 3\}", "%d", r"2^{%d}"]


def rollouts(prompts, trainer, tokens: int) -> dict:
    """Completions of `tokens` tokens, in four steps with a tool's words between them; about one in four is right."""
    draw, tokenizer = random.Random(trainer.state.global_step), trainer.processing_class

    def encoded(text):
        return tokenizer(text)["input_ids"]

    heads, said, filler = (
        [encoded(f"\n### Step {step}: ") for step in range(1, 5)],
        encoded(" the tool."),
        encoded("Then 3 + 4 = 7. "),
    )
    ids, masks = [], []
    for _ in prompts:
        end = encoded(f" #### {draw.choice(['7'] * 4 + ['8'] * 7 + ['9', '10', '11', '12', '13'])}")
        left = tokens - sum(map(len, heads)) - 3 * len(said) - len(end)
        row, mask = [], []
        for step, head in enumerate(heads):
            size = left // 4 + (left % 4 if step == 3 else 0)
            written = head + (filler * size)[:size]
            row += written + (end if step == 3 else said)
            mask += [1] * len(written) + ([1] * len(end) if step == 3 else [0] * len(said))
        ids.append(row)
        masks.append(mask)
    rendered = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]
    return {"prompt_ids": rendered, "completion_ids": ids, "logprobs": [[0.0] * tokens] * len(ids), "env_mask": masks}


def verdicts(requests) -> list[str]:
    """What a judge might answer: every item holds, in steps that differ from completion to completion."""
    return [
        json.dumps([{"id": item.id, "satisfied": True, "step": 1 + (item.id + index) % 4} for item in request.rubric])
        for index, request in enumerate(requests)
    ]


def measure(flags: dict, steps: int, group: int, tokens: int) -> dict:
    """Trains for some steps; returns processor seconds of a step and of its shaping, medians without the first."""
    from functools import partial

    from datasets import Dataset

    from hf_rb import GRPOConfig, GRPOTrainer, tiny
    from hf_rb.rl.rewards import build_reward
    from hf_rb.trainers.grpo import trainer as grpo_trainer

    seconds = {"context": [], "shape": [], "step": []}

    def timed(name, function):
        def wrapper(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            seconds[name].append(time.process_time() - start)
            return result

        return wrapper

    class Timed(GRPOTrainer):
        _shape = timed("shape", GRPOTrainer._shape)
        training_step = timed("step", GRPOTrainer.training_step)

    rows = [
        {"prompt": row["prompt"], "answer": "7", "rubric": RUBRIC}
        for row in tiny.load_dataset("math", "prompt_only", size=steps).to_list()
    ]
    make_context, grpo_trainer.make_context = grpo_trainer.make_context, timed("context", grpo_trainer.make_context)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder, num_generations=group, per_device_train_batch_size=group, max_completion_length=tokens, max_steps=steps,
            correct_reward="exact_answer_reward", answer_extractor="hashes", use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=steps, **flags,
        )  # fmt: skip
        trainer = Timed(
            str(tiny.path("student")),
            build_reward("exact_answer_reward", "hashes"),
            args,
            Dataset.from_list(rows),
            rollout_func=partial(rollouts, tokens=tokens),
            step_scorer=lambda ctx: [[0.5] * 3 for _ in ctx.completions],
            judge=verdicts,
        )
        trainer.train()
    grpo_trainer.make_context = make_context
    log = trainer.state.log_history[0]
    inactive = [key for key, value in log.items() if key.endswith("/changed") and not value]
    if inactive:
        raise RuntimeError(f"A shaper did not act: {', '.join(inactive)}.")
    step = median(seconds["step"][1:])
    shaping = median(map(sum, zip(seconds["context"][1:], seconds["shape"][1:], strict=True)))
    return {"step_seconds": step, "shaping_seconds": shaping, "share": shaping / step}


def math_verify(group: int, groups: int) -> float:
    """Median seconds that EDAS with `math-verify`, a process of its own, takes for a group of new answers, in LaTeX."""
    from hf_rb.advantages import edas
    from hf_rb.rl.rewards import math_equivalent

    math_equivalent("1", "2")  # imports
    spent = []
    for number in range(groups):
        answers = [LATEX[index % len(LATEX)] % (index // 2 + 100 * number) for index in range(group)]
        start = time.perf_counter()
        edas(torch.full((group,), -1.0), group, [False] * group, answers, equivalent=math_equivalent)
        spent.append(time.perf_counter() - start)
    return median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--groups", type=int, default=10, help="groups for math-verify")
    args = parser.parse_args()
    torch.set_num_threads(1)  # processor seconds are then those of one thread
    results = {name: measure(flags, args.steps, args.group, args.tokens) for name, flags in PIPELINES.items()}
    verify = math_verify(args.group, args.groups)
    lines = [
        "# What advantage shapers cost",
        "",
        f"Processor time of a step and of its shapers: {args.group} completions of {args.tokens:,} tokens, the embedded student, one "
        f"thread, median of {args.steps - 1} steps. Completions are given, not sampled. Bar: below 1 %.",
        "",
        "| shapers | step (s) | shapers (ms) | share |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {result['step_seconds']:.2f} | {1000 * result['shaping_seconds']:.1f} | {result['share']:.2%} |"
            for name, result in results.items()
        ),
        "",
        f"EDAS with `math-verify` on {args.group} new wrong answers in LaTeX: {1000 * verify:.0f} ms a group (median of {args.groups}).",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    found = {"arguments": vars(args), "pipelines": results, "math_verify_seconds_per_group": verify}
    (RESULTS / "rl_overhead.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "rl_overhead.md").write_text(text)


if __name__ == "__main__":
    main()
