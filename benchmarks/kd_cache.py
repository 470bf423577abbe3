"""Size and loss of cached teachers: `python benchmarks/kd_cache.py [--model FOLDER] [--text FILE] [--questions FILE.jsonl]`.

A teacher's most probable tokens are captured with `cache_teacher` for every k and type, and read back with `CachedTeacher`. Bytes are
those of all files without the vocabulary's, for each prediction. The truncation KL is that from the teacher to what is stored of it,
with the rest of the mass spread evenly over the tokens that are not. The teacher runs once: its hidden states are kept between cells.
Writes `benchmarks/results/kd_cache.json` and `.md`.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_rb import SFTConfig, SFTTrainer, tiny
from hf_rb.teachers import CachedTeacher, LocalTeacher, cache_teacher


RESULTS = Path(__file__).parent / "results"
KS = (16, 64, 128)
MAX_LENGTH = 512


def sources(args: argparse.Namespace, tokenizer) -> dict[str, Dataset]:
    """The data by name: completions of the embedded problems, of a file of questions, and every token of a text."""
    found = {"tiny:math": tiny.load_dataset("math", config="prompt_completion", size=2000)}
    if args.questions:
        lines = [json.loads(line) for line in Path(args.questions).read_text().splitlines()]
        rows = [
            {
                "prompt": [{"role": "user", "content": line["question"]}],
                "completion": [{"role": "assistant", "content": line["answer"]}],
            }
            for line in lines[:2000]
        ]
        found[Path(args.questions).name] = Dataset.from_list(rows)
    if args.text:
        ids = tokenizer(Path(args.text).read_text()[: 8 * args.tokens])["input_ids"]
        rows = [{"input_ids": ids[start : start + MAX_LENGTH]} for start in range(0, args.tokens, MAX_LENGTH)]
        found[Path(args.text).name] = Dataset.from_list(rows)
    return found


def make_trainer(args: argparse.Namespace, tokenizer, dataset: Dataset, scratch: str) -> SFTTrainer:
    """A trainer with a student of hardly any weights, and the data cut to the wanted number of predictions."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    settings = SFTConfig(scratch, use_cpu=True, bf16=False, report_to="none", max_length=MAX_LENGTH, disable_tqdm=True)
    trainer = SFTTrainer(LlamaForCausalLM(config), settings, train_dataset=dataset, processing_class=tokenizer)
    predictions, rows = 0, 0
    for row in trainer.train_dataset:
        predictions += sum(label != -100 for label in row.get("labels", row["input_ids"])[1:])
        rows += 1
        if predictions >= args.tokens:
            break
    trainer.train_dataset = trainer.train_dataset.select(range(rows))
    trainer.teacher = LocalTeacher(tiny.resolve(args.model), {"dtype": "float32"})
    trainer.teacher.prepare(trainer)
    return trainer


def remember(teacher: LocalTeacher) -> dict:
    """Makes a teacher run once on each batch, and returns the seconds it ran."""
    score, known, spent = teacher.score, {}, {"seconds": 0.0}

    def remembered(inputs, keep):
        key = inputs["input_ids"].numpy().tobytes()
        if key not in known:
            start = time.process_time()
            known[key] = score(inputs, keep)
            spent["seconds"] += time.process_time() - start
        return known[key]

    teacher.score = remembered
    return spent


def read_seconds(trainer: SFTTrainer, folder: Path) -> float:
    """CPU seconds to read every prediction once, in shuffled batches of 4."""
    teacher = CachedTeacher(folder)
    teacher.prepare(trainer)
    batches = list(trainer.get_train_dataloader())
    start = time.process_time()
    for batch in batches:
        teacher.score(batch, batch["labels"][:, 1:] != -100)
    return time.process_time() - start


def measure(args: argparse.Namespace) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(tiny.resolve(args.model))
    cells = []
    for name, dataset in sources(args, tokenizer).items():
        with tempfile.TemporaryDirectory() as scratch:
            trainer = make_trainer(args, tokenizer, dataset, scratch)
            spent = remember(trainer.teacher)
            for k in KS:
                for dtype in ("float16", "float32"):
                    folder = Path(scratch, "cache")
                    report = cache_teacher(trainer, folder, k=k, dtype=dtype, batch_tokens=2048)
                    size = report.file_bytes - (folder / "vocabulary.json").stat().st_size
                    cell = {"data": name, "k": k, "dtype": dtype} | asdict(report)
                    cell |= {"bytes_per_token": size / report.tokens, "read_seconds": read_seconds(trainer, folder)}
                    cell |= {"teacher_seconds": spent["seconds"], "vocabulary": trainer.teacher.vocabulary}
                    cells.append({key: value for key, value in cell.items() if key != "folder"})
                    shutil.rmtree(folder)
                    print(
                        f"{name:24} k={k:<4} {dtype} {cell['bytes_per_token']:7.1f} B/token, KL {report.truncation_kl:.5f}, "
                        f"tail {report.tail_mass:.4f}",
                        flush=True,
                    )
    return {
        "model": Path(args.model).name,
        "max_length": MAX_LENGTH,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.machine(),
        "cells": cells,
    }


def render(result: dict) -> str:
    """The table in Markdown."""
    vocabulary = result["cells"][0]["vocabulary"]
    lines = [
        f"# Cached teachers: {result['model']}",
        "",
        "| data | predictions | k | type | bytes a prediction | of dense 16-bit logits | not stored | truncation KL | read / teacher CPU |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for c in result["cells"]:
        dense = c["bytes_per_token"] / (2 * vocabulary)
        read = c["read_seconds"] / c["teacher_seconds"]
        lines.append(
            f"| {c['data']} | {c['tokens']:,} | {c['k']} | {c['dtype']} | {c['bytes_per_token']:.1f} | {dense:.2%} | "
            f"{c['tail_mass']:.2%} | {c['truncation_kl']:.5f} | {read:.2%} |"
        )
    lines += [
        "",
        f"- Vocabulary {vocabulary:,}: 16-bit logits would take {2 * vocabulary:,} bytes a prediction. Bytes count keys, counts, positions and "
        "the manifest, not the vocabulary file, which does not grow with the data.",
        "- `not stored` is the teacher's probability outside the stored tokens. Training keeps it as one event; the truncation KL, in nats, is "
        "what would be lost by spreading it evenly, rounding of the log-probabilities included. k + 1 tokens are stored: the label too.",
        "- `read / teacher CPU` is the processor time of reading shuffled batches of 4 from the cache over that of the teacher's forward pass "
        "on the same tokens, its LM head not counted.",
        f"- Sequences of up to {result['max_length']} tokens, teacher in float32; torch {result['versions']['torch']}, transformers "
        f"{result['versions']['transformers']}, {result['machine']}, {result['threads']} thread(s).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny:teacher", help="a model folder, a Hub id or tiny:teacher")
    parser.add_argument("--text", help="a text file, of which every token is predicted")
    parser.add_argument(
        "--questions", help="a JSON-lines file with `question` and `answer`, of which the answers are predicted"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="predictions for each of the data (default 8192)")
    args = parser.parse_args()
    result = measure(args)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kd_cache.json").write_text(json.dumps(result, indent=2) + "\n")
    table = render(result)
    (RESULTS / "kd_cache.md").write_text(table)
    print("\n" + table)


if __name__ == "__main__":
    main()
