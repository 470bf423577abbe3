"""Work of `hf-rb demo`: fine-tune the tiny student with ProFit, quantize it with PTQTP, and measure every step. The
tiny teacher, which has learnt its task, is quantized beside it.
"""

import ast
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any, cast

from hf_rb import tiny
from hf_rb.io.files import atomic_folder
from hf_rb.io.resources import find_recipe


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_rb.evaluation import ExactMatch, Perplexity, Size, Speed

__all__ = ["Row", "demo"]

RECIPE = "profit/tiny-cpu"
TASK = "tiny:math"
STAGES = 7


@dataclass
class Row:
    """A model of the demo and what was measured on it."""

    model: str
    exact_match: "ExactMatch"
    perplexity: "Perplexity"
    size: "Size"
    speed: "Speed"

    def cells(self) -> list[str]:
        return [
            self.model,
            f"{self.exact_match.accuracy:.1%}",
            f"{self.perplexity.perplexity:.3f}",
            f"{self.size.file_bytes:,}",
            f"{self.size.bits_per_weight:.2f}",
            f"{self.speed.tokens_per_second:.0f}",
        ]


HEADER = ["model", "exact match", "perplexity", "file bytes", "bits/weight", "tokens/s"]


class _Clock:
    """Prints the stages and remembers how long each took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str) -> Generator[None]:
        print(f"\n[{len(self.seconds) + 1}/{STAGES}] {title}", flush=True)
        start = perf_counter()
        yield
        self.seconds[title] = perf_counter() - start
        print(f"      {self.seconds[title]:.1f} s", flush=True)


def demo(
    output: str | Path, *, problems: int = 300, train_arguments: Sequence[str] = (), overwrite: bool = False
) -> list[Row]:
    """Runs the demo and prints one table.

    Args:
        output (`str` or `Path`):
            Folder that appears when everything is done: the models with their cards, `demo.json` and the training log.
        problems (`int`, *optional*, defaults to `300`):
            Held-out problems to evaluate on.
        train_arguments (`Sequence[str]`, *optional*, defaults to `()`):
            What to change in the recipe, as `--max_steps 5`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.

    Returns:
        `list[Row]`: What was measured: the student before, fine-tuned, and quantized; the teacher before, and
        quantized.

    Raises:
        FileExistsError: `output` is not empty and `overwrite` is `False`.
        RuntimeError: The training failed, or the saved model does not compute what it did before it was saved.
    """
    output, clock = Path(output), _Clock()
    with atomic_folder(output, overwrite) as folder:
        tuned, quantized = folder / "student-profit", folder / "student-profit-ptqtp"
        with clock.stage(f"Load the libraries and evaluate the student on {problems} held-out problems"):
            import torch
            from transformers.utils.logging import disable_progress_bar

            from hf_rb import evaluation

            disable_progress_bar()
            # Matrices this small gain nothing from a second thread and lose much when another process wants the core.
            torch.set_num_threads(1)
            rows = evaluation.load_task(TASK, problems)
            student = tiny.path("student")
            table = [_measure("tiny student", *evaluation.load_model(student), student, rows)]

        with clock.stage(f"Fine-tune it with ProFit, recipe {RECIPE}"):
            _train(tuned, train_arguments, log=folder / "train.log")

        with clock.stage("Evaluate the fine-tuned student"):
            table.append(_measure("+ ProFit", *evaluation.load_model(tuned, "bfloat16"), tuned, rows))

        with clock.stage("Quantize it with PTQTP, save, reload and compare"):
            reloaded = _quantize(tuned, quantized)

        with clock.stage("Evaluate the quantized student"):
            table.append(_measure("+ ProFit + PTQTP", *reloaded, quantized, rows))

        with clock.stage("Evaluate, quantize and evaluate the teacher, for comparison"):
            teacher, smaller_teacher = tiny.path("teacher"), folder / "teacher-ptqtp"
            table.append(_measure("tiny teacher", *evaluation.load_model(teacher), teacher, rows))
            table.append(_measure("+ PTQTP", *_quantize(teacher, smaller_teacher), smaller_teacher, rows))

        with clock.stage("Write the model cards"):
            student_card = {"trainer": "SFTTrainer", "dataset_name": TASK, "hyperparameters": _recipe(train_arguments)}
            _write_card(quantized, ["profit", "ptqtp"], "tiny:student", table[0], table[2], **student_card)
            _write_card(smaller_teacher, ["ptqtp"], "tiny:teacher", table[3], table[4])
            report = {"rows": [asdict(row) for row in table], "seconds": clock.seconds}
            (folder / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    _print_summary(output, table, clock.seconds)
    return table


def _measure(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    problems: list[dict],
) -> Row:
    from hf_rb import evaluation

    texts, contexts = evaluation.solutions(tokenizer, problems)
    row = Row(
        model=name,
        exact_match=evaluation.exact_match(model, tokenizer, problems, max_new_tokens=96, batch_size=len(problems)),
        perplexity=evaluation.perplexity(model, tokenizer, texts, contexts=contexts, batch_size=32),
        size=evaluation.model_size(folder),
        speed=evaluation.decode_speed(model),
    )
    print("      " + ", ".join(f"{label} {cell}" for label, cell in zip(HEADER[1:], row.cells()[1:], strict=True)))
    return row


def _train(folder: Path, arguments: Sequence[str], log: Path) -> None:
    """Trains in a process of its own, as a user would; all of its output goes to `log`, its losses to the screen."""
    launch = "launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    script = ["-m", "hf_rb.scripts.sft", "--config", str(find_recipe(RECIPE)), *arguments]
    print(f"      accelerate launch {shlex.join(script)}", flush=True)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, *script]
    command += ["--output_dir", str(folder), "--disable_tqdm", "true"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(command, env=environment, **pipes) as process:
        for line in cast(IO[str], process.stdout):
            file.write(line)
            if summary := _summarize(line):
                print(f"      {summary}", flush=True)
    if process.returncode:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-30:])
        raise RuntimeError(f"The training ended with exit code {process.returncode}:\n{tail}")


def _summarize(line: str) -> str | None:
    """Shortens a line of the trainer's log to its loss and ProFit's share of kept tokens; anything else gives
    `None`.
    """
    try:
        logs = ast.literal_eval(line.strip())
        return (
            f"epoch {float(logs['epoch']):.2f}  loss {float(logs['loss']):.4f}  tokens kept "
            f"{float(logs['profit/kept_fraction']):.1%}"
        )
    except (ValueError, SyntaxError, TypeError, KeyError):
        return None


def _quantize(source: Path, destination: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Quantizes while loading, saves, loads again, and compares the two models' logits bit by bit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_rb import PTQTPConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    # bfloat16 for what is not quantized: the trainer saves float32.
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=PTQTPConfig(), dtype=torch.bfloat16
    ).eval()
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    reloaded = AutoModelForCausalLM.from_pretrained(destination).eval()
    ids = torch.arange(256).reshape(2, 128) % model.config.vocab_size
    with torch.no_grad():
        if not torch.equal(model(ids).logits, reloaded(ids).logits):
            raise RuntimeError(
                "The reloaded model computes other logits than the one that was saved: please report this."
            )
    print("      the reloaded model's logits are bit-equal to those of the model that was saved")
    return reloaded, tokenizer


def _recipe(train_arguments: Sequence[str]) -> dict:
    """What the recipe and the arguments say about the training itself."""
    import yaml

    recipe = yaml.safe_load(find_recipe(RECIPE).read_text(encoding="utf-8"))
    recipe |= dict(zip((key.removeprefix("--") for key in train_arguments[::2]), train_arguments[1::2], strict=True))
    keys = "profit_threshold learning_rate lr_scheduler_type warmup_steps max_steps per_device_train_batch_size seed"
    return {key: recipe[key] for key in keys.split() if key in recipe}


def _write_card(folder: Path, methods: list[str], base_model: str, before: Row, after: Row, **fields: Any) -> None:
    from hf_rb.hub import ModelCardData, Result, write_model_card

    results = [
        Result("exact match", after.exact_match.accuracy, TASK, before=before.exact_match.accuracy),
        Result("perplexity", after.perplexity.perplexity, TASK, before=before.perplexity.perplexity),
    ]
    data = ModelCardData(
        folder.name, methods, base_model, results=results, size=after.size, license="apache-2.0", **fields
    )
    write_model_card(folder, data)


def _print_summary(output: Path, table: list[Row], seconds: dict[str, float]) -> None:
    from hf_rb.evaluation import format_table

    problems, student = table[0].exact_match.count, table[2]
    print("\n" + format_table(HEADER, [row.cells() for row in table]))
    print(
        f"""
exact match   greedy answers to {problems} held-out word problems; one standard error is at most \
{50 / problems**0.5:.1f} points
perplexity    of the worked solutions, given the problems; ProFit leaves improbable tokens alone, so it need not fall
bits/weight   8 x bytes of the weight files / weights; {student.size.quantized_bits_per_weight:.2f} in \
the quantized layers of the student: 16-bit embeddings
              weigh more in a model of {student.size.weights / 1e6:.1f} million weights than in a large one; \
the trainer saves float32
tokens/s      one sequence, with a cache; without kernels, PTQTP unpacks a layer once and multiplies as before: it \
gains bytes, not time
A model this small shows that everything works, not how much the methods gain: see model_cards/ for that."""
    )
    print(
        f"\nIn {output}: student-profit, student-profit-ptqtp and teacher-ptqtp with their cards; demo.json; "
        "train.log\n"
        f"`hf-rb report {output}/student-profit --out report.html` draws what ProFit masked (pip "
        "install 'hf_rb[report]')"
    )
    print("\nSeconds by stage")
    for index, (title, value) in enumerate(seconds.items(), start=1):
        print(f"  {index}. {title:<75} {value:6.1f}")
    print(f"     {'total':<75} {sum(seconds.values()):6.1f}")
