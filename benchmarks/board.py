"""Every method on the same tiny model: `python benchmarks/board.py` (or `make bench`). No input, no download, about half an hour.

A row is what a user would type: commands of `hf-rb` that start from the embedded student, which solves half of its problems, and leave
a model in a folder. Rows of one group share data, seed, steps, batch size and learning rate; they differ in the method's own flags.
Peers are rows too: TRL's trainers where ours differ from them without a flag, and 3- and 4-bit rounding.

Every folder is measured alike: greedy exact match and perplexity on held-out problems, bytes of the weight files, and processor seconds
of its commands. One seed of one tiny model: differences of a few hundredths between rows of a group mean nothing. CalibAdv is missing: it
shapes what agents do with tools, which these problems do not have (`hf-rb grpo calibadv/tiny-cpu` has).

Writes `benchmarks/results/board.json` and `.md`; rows that the JSON file has at the same budget are not run again.
"""

import argparse
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple


RESULTS = Path(__file__).parent / "results"
SEED = 42
CPU = "--use_cpu --bf16 false --gradient_checkpointing false --save_strategy no --report_to none --disable_tqdm true"
TRAIN = f"--model_name_or_path tiny:student --dataset_name tiny:math {CPU} --seed {SEED} --logging_steps 10"
TEACHER = "--teacher_model_name_or_path tiny:teacher"


class Row(NamedTuple):
    """One line of the table; in `commands`, `{out}` stands for the folder that is measured, `{work}` for one that is thrown away."""

    name: str
    flags: str
    commands: tuple[str | Callable[[Path, Path], None], ...]
    peer: bool = False


def others(key: str, named: dict[str, str], runs: Callable[[Any], bool]) -> dict[str, str]:
    """Returns the flags of the methods with a paper that no row names yet, by their names."""
    from hf_rb.methods.recipes import KEYS
    from hf_rb.methods.registry import methods

    taken = " ".join(named.values()).split()
    found = (entry.method for entry in methods(KEYS[key]).values())
    return {one.name: f"--{key} {one.key}" for one in found if one.paper and runs(one) and one.key not in taken}


def supervised(steps: int) -> Iterator[Row]:
    common = (
        f"{TRAIN} --dataset_config prompt_completion --max_steps {steps} --per_device_train_batch_size 32 --max_length 256 "
        "--learning_rate 5e-4 --lr_scheduler_type cosine --warmup_steps 5 --output_dir {out}"
    )
    sft, gkd = f"sft {common}", f"gkd {common} {TEACHER} --lmbda 0"
    yield Row("TRL's SFT (ours without a flag is the same bit for bit)", "", (sft,), peer=True)
    yield from (
        Row(name, flags, (f"sft {common} {flags}",)) for name, flags in {"ProFit": "--profit_threshold 0.1"}.items()
    )
    yield Row("TRL's GKD, forward KL", "", (partial(trl_gkd, steps=steps),), peer=True)
    objectives = {
        "forward KL": "--objective forward_kl",
        "AKL": "--objective akl",
        "HPD": "--objective hpd",
        "LoCa": "--objective forward_kl --loca_alpha 0.95",
    }
    objectives |= others("objective", objectives, lambda method: method.completions != "student")
    yield from (Row(name, flags, (f"{gkd} {flags}",)) for name, flags in objectives.items())
    lora = "--objective forward_kl --kd_alpha 0.9 --use_peft --lora_target_modules all-linear --lora_r 16"
    adapter = gkd.replace("{out}", "{work}")
    yield Row("LLM-Neo, its adapter merged", lora, (f"{adapter} {lora}", merged))
    sft = sft.replace("{out}", "{work}/tuned")
    yield Row(
        "Shadow-FT",
        "--graft_onto tiny:student",
        (f"{sft.replace('{work}/tuned', '{out}')} --graft_onto tiny:student --graft_dtype float32",),
    )
    yield Row(
        "Interpolation, half way to TRL's SFT",
        "--lambda 0.5",
        (sft, "merge --method linear --start tiny:student --end {work}/tuned --files-from start {out}"),
    )
    yield Row(
        "Timber on TRL's SFT",
        "--lambda 0.2",
        (sft, "merge --method timber --base tiny:student --model {work}/tuned {out}"),
    )
    moe = sft.replace("tiny:student", "{work}/moe").replace("{work}/tuned", "{out}")
    yield Row(
        "Mixture of 8 experts from the student, SFT",
        "",
        ("upcycle tiny:student {work}/moe --experts 8 --top-k 2", moe),
        peer=True,
    )
    yield Row(
        "the same with MPI routers", "--mpi", ("upcycle tiny:student {work}/moe --experts 8 --top-k 2 --mpi", moe)
    )


def sampled(steps: int) -> Iterator[Row]:
    common = (
        f"{TRAIN} --max_steps {steps} --per_device_train_batch_size 64 --learning_rate 3e-5 --lr_scheduler_type constant "
        "--temperature 1.0 --max_completion_length 96 --output_dir {out}"
    )
    grpo = (
        f"grpo {common} --num_generations 8 --loss_type dapo --epsilon_high 0.28 --beta 0 --answer_extractor hashes "
        "--reward_funcs exact_answer_reward --correct_reward exact_answer_reward"
    )
    plain, rubric = "--dataset_config prompt_only", "--dataset_config rubric"
    yield Row("TRL's GRPO (ours without a shaper is the same bit for bit)", "", (f"{grpo} {plain}",), peer=True)
    shapers = {
        "EDAS": f"--advantage_shapers edas {plain}",
        "SRaR, offline judge": f"--advantage_shapers srar --srar_judge tiny --srar_step_pattern '(?m)(?:^|(?<=\\. ))(?=[A-Z])' {rubric}",
        "Hidden-Align": f"--hidden_align_coef 0.1 {plain}",
    }
    runs = others("advantage_shapers", shapers, lambda method: method.key != "calibadv")
    shapers |= {name: f"{flags} {plain}" for name, flags in runs.items()}
    yield from (Row(name, flags, (f"{grpo} {flags}",)) for name, flags in shapers.items())
    distillation = f"distillation {common} {plain} {TEACHER}"
    yield Row("on-policy distillation", "--objective gopd", (f"{distillation} --objective gopd",), peer=True)
    yield Row("ExOPD", "--reward_scale 1.25", (f"{distillation} --objective gopd --reward_scale 1.25",))


def quantized() -> Iterator[Row]:
    data = "--dataset tiny:math --num-samples 64 --seqlen 256 --batch-size 8 --group-size 64"
    rounding = "--method d2quant --backend rtn --no-dsq --group-size 64"
    settings = {
        "rounding, 4 bits": (f"{rounding} --bits 4", True),
        "rounding, 3 bits": (f"{rounding} --bits 3", True),
        "rounding, 2 bits": (f"{rounding} --bits 2", True),
        "GPTQ, 3 bits": (f"--method d2quant --backend gptq --no-dsq --no-dac --no-rotate --bits 3 {data}", True),
        "GPTQ, 2 bits": (f"--method d2quant --backend gptq --no-dsq --no-dac --no-rotate --bits 2 {data}", True),
        "D²Quant, 3 bits": (f"--method d2quant --bits 3 {data}", False),
        "D²Quant, 2 bits": (f"--method d2quant --bits 2 {data}", False),
        "PTQTP, 3 planes": ("--method ptqtp --planes 3 --group-size 64", False),
        "PTQTP": ("--method ptqtp --group-size 64", False),
        "PTQTP, 1 plane": ("--method ptqtp --planes 1 --group-size 64", False),
        "D²Quant, 2 and 4 bits by NSDS": (f"--method d2quant --bits-per-layer nsds:3.0 {data}", False),
        "PTQTP, 2 and 3 planes by NSDS": ("--method ptqtp --planes-per-layer nsds:2.5 --group-size 64", False),
    }
    for name, (flags, peer) in settings.items():
        yield Row(name, flags, (f"quantize tiny:student {{out}} {flags}",), peer)
    flags = "--baseline false --eval_problems 100"
    recover = f"recover recover/tiny-cpu --model_name_or_path tiny:student --output_dir {{work}} {flags}"
    yield Row("PTQTP, 1 plane in groups of 128, recovered", flags, (recover, packaged))


def trl_gkd(out: Path, work: Path, steps: int) -> None:
    """TRL's own GKDTrainer; beta 0 is its forward KL."""
    from transformers import AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from hf_rb import tiny

    student = tiny.resolve("tiny:student")
    args = GKDConfig(
        out, lmbda=0.0, beta=0.0, temperature=1.0, max_steps=steps, per_device_train_batch_size=32, max_length=256,
        learning_rate=5e-4, lr_scheduler_type="cosine", warmup_steps=5, seed=SEED, logging_steps=10, save_strategy="no",
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = tiny.load_dataset("math", config="messages", split="train")
    tokenizer = AutoTokenizer.from_pretrained(student)
    trainer = GKDTrainer(
        student, tiny.resolve("tiny:teacher"), args, train_dataset=data.select_columns("messages"), processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    trainer.save_model(out)


def merged(out: Path, work: Path) -> None:
    """The model of an adapter."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    AutoPeftModelForCausalLM.from_pretrained(work).merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(work).save_pretrained(out)


def packaged(out: Path, work: Path) -> None:
    """What `hf-rb recover` leaves to publish."""
    (work / "model").rename(out)


def run(row: Row, problems: int) -> dict[str, Any]:
    """Runs a row's commands in this process and measures what they leave."""
    from hf_rb.cli import main as hf_rb

    with tempfile.TemporaryDirectory() as folder:
        out, work = Path(folder) / "out", Path(folder) / "work"
        start = time.process_time()
        for command in row.commands:
            if callable(command):
                command(out, work)
                continue
            verb, *arguments = shlex.split(command.format(out=out, work=work))
            with redirect_stdout(StringIO()) as said:
                code = (
                    train(verb, arguments)
                    if verb in ("sft", "gkd", "grpo", "distillation")
                    else hf_rb([verb, *arguments])
                )
            if code:
                raise SystemExit(f"{row.name}: `hf-rb {verb}` ended with {code}:\n{said.getvalue()}")
        seconds = time.process_time() - start
        return {"cpu_seconds": seconds, **measure(out, problems)}


def train(verb: str, arguments: list[str]) -> None:
    """What `hf-rb sft` and the like launch, without another process."""
    from importlib import import_module

    import_module(f"hf_rb.scripts.{verb}").main(arguments)


def measure(model_folder: str | Path, problems: int) -> dict[str, Any]:
    from hf_rb import evaluation
    from hf_rb.io.model_folder import adapter_beside
    from hf_rb.recover import load_recovered

    found = evaluation.find_model(str(model_folder))
    load = load_recovered if adapter_beside(found) else evaluation.load_model
    model, tokenizer = load(found, dtype="float32")
    rows = evaluation.load_task("tiny:math", problems)
    texts, contexts = evaluation.solutions(tokenizer, rows)
    tokenizer.padding_side = "left"
    return {
        "exact_match": evaluation.exact_match(model, tokenizer, rows, max_new_tokens=96).accuracy,
        "perplexity": evaluation.perplexity(model, tokenizer, texts, contexts=contexts, batch_size=32).perplexity,
        "megabytes": evaluation.model_size(found).file_bytes / 1e6,
    }


def render(result: dict[str, Any]) -> str:
    budget = result["budget"]
    lines = [
        "# Every method on the embedded student",
        "",
        f"Greedy exact match on {budget['problems']} held-out problems, perplexity of their worked solutions, weight files, processor seconds. One "
        f"seed of one tiny model: a few hundredths mean nothing (a standard error is {(0.25 / budget['problems']) ** 0.5:.3f}). Rows in italics are "
        "peers. `make bench` repeats it.",
    ]
    titles = {
        "start": "Where all start",
        "supervised": f"From data: {budget['steps']} steps of 32 problems, peak learning rate 5e-4",
        "sampled": f"From what the model writes: {budget['sampled_steps']} steps of 64 completions, learning rate 3e-5 (CalibAdv needs an agent with tools: `hf-rb grpo calibadv/tiny-cpu`)",
        "quantized": "Quantized, groups of 64, embeddings left as they are",
    }
    for group, title in titles.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| | flags | exact match | perplexity | MB | CPU s |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for row in result["rows"]:
            if row["group"] == group:
                name = f"*{row['name']}*" if row["peer"] else row["name"]
                flags = f"`{row['flags']}`".replace("|", "\\|") if row["flags"] else ""
                numbers = f"{row['exact_match']:.3f} | {row['perplexity']:.4g} | {row['megabytes']:.2f} | {row['cpu_seconds']:.0f}"
                lines.append(f"| {name} | {flags} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the supervised rows")
    parser.add_argument("--sampled-steps", type=int, default=20, help="of the rows that sample")
    parser.add_argument("--problems", type=int, default=300, help="held-out problems")
    parser.add_argument("--fresh", action="store_true", help="run again what the JSON file has")
    args = parser.parse_args()

    budget = {"steps": args.steps, "sampled_steps": args.sampled_steps, "problems": args.problems, "seed": SEED}
    file = RESULTS / "board.json"
    known = json.loads(file.read_text()) if file.is_file() and not args.fresh else {}
    done = {
        (row["group"], row["name"], row["flags"]): row for row in known.get("rows", []) if known["budget"] == budget
    }
    groups = {"supervised": supervised(args.steps), "sampled": sampled(args.sampled_steps), "quantized": quantized()}
    rows = [
        {"group": "start", "name": name, "flags": "", "peer": False, "cpu_seconds": 0.0}
        | (done.get(("start", name, "")) or measure(name, args.problems))
        for name in ("tiny:student", "tiny:teacher")
    ]
    for group, found in groups.items():
        for row in found:
            facts = {"group": group, "name": row.name, "flags": row.flags, "peer": row.peer}
            rows.append(facts | (done.get((group, row.name, row.flags)) or run(row, args.problems)))
            print(rows[-1], flush=True)
            result = {"budget": budget, "rows": rows}
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(render(result), encoding="utf-8")
    print(render(result))


if __name__ == "__main__":
    main()
