"""Measures a model, alone or with an adapter that was trained on it."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rb.evaluation import (
    ExactMatch,
    beginning,
    decode_speed,
    exact_match,
    load_model,
    model_size,
    perplexity,
    solutions,
)
from hf_rb.io.model_folder import find_model
from hf_rb.io.resumable import write_json
from hf_rb.quantizers.packed.baseline import packed_weights, round_weights
from hf_rb.recover.stages import fingerprint


__all__ = [
    "ADAPTER",
    "BASE",
    "Measured",
    "Questions",
    "load_recovered",
    "measure",
    "measure_rounded",
    "read_measured",
    "read_pool",
    "read_rounded",
]

ADAPTER = "adapter"
BASE = "base.json"
MEASURED, POOL, ROUNDED = "measured.json", "pool.json", "rounded.json"


@dataclass(frozen=True)
class Measured:
    """
    Quality and cost of one model.

    Attributes:
        bytes (`int`): Of all weight files that inference needs, the adapter's too.
        exact_match (`float`, *optional*): Share of the held-out problems that it solves.
        perplexity (`float`, *optional*): On the held-out text, or else on the worked solutions of the held-out
            problems.
        tokens_per_second (`float`): Greedy decoding of one sequence on this machine.
    """

    bytes: int
    exact_match: float | None
    perplexity: float
    tokens_per_second: float


@dataclass(frozen=True)
class Questions:
    """
    Problems and text that models are measured on.

    Attributes:
        task (`list[dict]`): Held-out problems, if there are any.
        pool (`list[dict]`): Problems to learn from, if there are any.
        text (`str`, *optional*): Held-out text.
        max_new_tokens (`int`): Limit of a solution.
        batch_size (`int`): Problems solved at a time.
    """

    task: list[dict[str, Any]]
    pool: list[dict[str, Any]]
    text: str | None
    max_new_tokens: int
    batch_size: int

    def solve(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[dict]) -> ExactMatch:
        return exact_match(model, tokenizer, problems, self.max_new_tokens, self.batch_size)

    def perplexity(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        if self.text is None:
            texts, contexts = solutions(tokenizer, self.task)
            return perplexity(model, tokenizer, texts, contexts=contexts).perplexity
        return perplexity(model, tokenizer, beginning(tokenizer, self.text)).perplexity


def load_recovered(
    folder: str | Path, base: str | Path | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a recovered model, its adapter on the packed base, and its tokenizer.

    Args:
        folder (`str` or `Path`):
            Folder or Hub id with the adapter in `adapter`, and the base unless that is given.
        base (`str` or `Path`, *optional*):
            Folder of the packed base.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of what is not packed.

    Returns:
        `tuple`: The model, with the adapter in its layers, and the tokenizer.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The adapter was trained on other weights than those of the base.
    """
    folder = Path(folder) if base else find_model(str(folder))
    adapter, base = folder / ADAPTER, Path(base or folder)
    if not (adapter / BASE).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter of `hf-rb recover`: there is no {ADAPTER}/{BASE}.")
    stored = json.loads((adapter / BASE).read_text(encoding="utf-8"))
    if (found := fingerprint(base)) != stored["sha256"]:
        raise ValueError(
            f"The adapter in {folder} was trained on weights with the SHA-256 {stored['sha256'][:16]}…, and those in "
            f"{base} have {found[:16]}…: on them it is noise. Give the base that it was trained on, or train again."
        )
    model, tokenizer = load_model(base, dtype)
    PeftModel.from_pretrained(model, adapter)  # puts its layers into the model itself
    return model.eval(), tokenizer


def measure(
    folder: Path, questions: Questions, dtype: str, result: Path, adapter: Path | None = None, pool: bool = False
) -> None:
    """
    Measures a model and writes `measured.json` into the folder `result`; with `pool` its solutions of the pool as
    well.

    Args:
        folder (`Path`):
            The model, or the base of an adapter.
        questions ([`Questions`]):
            What on.
        dtype (`str`):
            Type to measure in.
        result (`Path`):
            Where to write.
        adapter (`Path`, *optional*):
            Folder that holds an adapter in `adapter`.
        pool (`bool`, *optional*, defaults to `False`):
            Whether to solve the problems of the pool.
    """
    model, tokenizer = load_recovered(adapter, folder, dtype) if adapter else load_model(folder, dtype)
    solved = questions.solve(model, tokenizer, questions.task) if questions.task else None
    size = model_size(folder).file_bytes
    if adapter:
        size += (adapter / ADAPTER / "adapter_model.safetensors").stat().st_size
    measured = Measured(
        size,
        solved.accuracy if solved else None,
        questions.perplexity(model, tokenizer),
        decode_speed(model).tokens_per_second,
    )
    if pool:
        write_json(result / POOL, asdict(questions.solve(model, tokenizer, questions.pool)))
    write_json(result / MEASURED, asdict(measured))


def measure_rounded(folder: Path, packed: Path, questions: Questions, dtype: str, result: Path) -> None:
    """Writes into `result` the perplexity of a model whose layers that are packed in another folder are rounded to 4
    bits instead.
    """
    start = time.perf_counter()
    names = packed_weights(load_model(packed, dtype)[0])
    model, tokenizer = load_model(folder, dtype)
    known = round_weights(model, names)
    perplexity = questions.perplexity(model, tokenizer) if known else None
    write_json(result / ROUNDED, {"perplexity": perplexity, "seconds": time.perf_counter() - start})


def read_rounded(folder: Path) -> tuple[float | None, float]:
    """Returns the perplexity that [`measure_rounded`] has written, and the seconds that it took."""
    found = json.loads((folder / ROUNDED).read_text(encoding="utf-8"))
    return found["perplexity"], found["seconds"]


def read_measured(folder: Path) -> Measured:
    """Returns what [`measure`] has written."""
    return Measured(**json.loads((folder / MEASURED).read_text(encoding="utf-8")))


def read_pool(folder: Path) -> ExactMatch:
    """Returns the solutions of the pool."""
    return ExactMatch(**json.loads((folder / POOL).read_text(encoding="utf-8")))
