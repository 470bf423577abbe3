"""Quantize, measure, find what broke, train an adapter on it, measure again, package."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_rb.evaluation import load_task
from hf_rb.io.files import check_replaceable, sha256_file
from hf_rb.io.model_folder import companions
from hf_rb.io.resumable import file_stamps, write_json
from hf_rb.io.texts import read_texts
from hf_rb.io.weight_files import find_weights
from hf_rb.methods.registry import find
from hf_rb.quantizers import quantize
from hf_rb.quantizers.folders.quantize import open_source
from hf_rb.recover import failures
from hf_rb.recover.config import RecoverConfig
from hf_rb.recover.measuring import (
    ADAPTER,
    Questions,
    measure,
    measure_rounded,
    read_measured,
    read_pool,
    read_rounded,
)
from hf_rb.recover.package import merged_model, write_package
from hf_rb.recover.report import RecoverReport, Row
from hf_rb.recover.stages import Stages, fingerprint
from hf_rb.recover.training import capture, make_config, train
from hf_rb.utils.special_tokens import special_tokens


__all__ = ["recover"]

STAGES, MODEL = "stages", "model"
RTN = {"quant_method": "d2quant", "backend": "rtn", "bits": 3, "dsq": False}


def recover(config: RecoverConfig, say: Callable[[str], None] = lambda line: None) -> RecoverReport:
    """
    Runs a recipe, from where an earlier run of it ended.

    Args:
        config ([`RecoverConfig`]):
            The recipe.
        say (`Callable[[str], None]`, *optional*):
            Gets a line about every stage.

    Returns:
        [`RecoverReport`]: the table, also in `model/report.json` and the card. If quantization broke no problem, it
        says so and there are no recovered rows.

    Raises:
        FileExistsError: `output_dir` holds something else and `overwrite` is `False`.
        FileNotFoundError: There is no such model, text or file of problems.
        ValueError: Data to learn from is among the held-out data, the model is quantized already, or its training
            diverged.
    """
    return _Pipeline(config, say).run()


@dataclass(frozen=True)
class _Base:
    """A quantized model: its name among the stages, and in the table."""

    name: str
    title: str
    config: dict[str, Any]


class _Pipeline:
    def __init__(self, config: RecoverConfig, say: Callable[[str], None]):
        for objective in config.objectives:
            make_config(config, objective, Path(config.output_dir))  # what is wrong with it is said before the work
        self.config = config
        self.output = Path(config.output_dir)
        self.source, *_ = open_source(config.model_name_or_path, self.output, dict(config.quantization_config))
        self.stages = Stages(self.output / STAGES, say)
        self.say = say
        self.questions = self._questions()
        self.report = RecoverReport(
            config.task and _name(config.task),
            config.eval_text and _name(config.eval_text),
            len(self.questions.task),
            begins_with=special_tokens(self.tokenizer).name if config.eval_text else None,
        )

    # Data: everything that can be wrong with it is found before a model is loaded.

    def _questions(self) -> Questions:
        config = self.config
        task = load_task(config.task, config.eval_problems) if config.task else []
        pool = load_task(config.pool, config.pool_problems, split="train") if config.pool else []
        texts = read_texts(config.eval_text, split="test") if config.eval_text else []
        held_out = failures.prompts(task) + failures.lines(texts)
        failures.check_apart(failures.prompts(pool), held_out, "problems")
        failures.check_apart(failures.lines(self.ordinary_texts), held_out, "lines of text")
        return Questions(task, pool, "\n\n".join(texts) or None, config.max_new_tokens, config.eval_batch_size)

    @cached_property
    def ordinary_texts(self) -> list[str]:
        return read_texts(self.config.train_text, split="train") if self.config.train_text else []

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.source)

    # Stages

    def run(self) -> RecoverReport:
        self._open()
        full = self.stages.run("full", self._measuring(self._source_stamp()), self._measures(self.source, pool=True))
        self._add("full precision", full)
        quantized, *others = self._bases()
        if package := self._recover(quantized, full):
            for base in others:
                self._recover(base, full)
            self.say("package …")
            self._package(*package)
        else:
            shutil.rmtree(self.output / MODEL, ignore_errors=True)  # of another recipe
        write_json(self.output / "report.json", self.report.to_dict())
        return self.report

    def _open(self) -> None:
        mine = self.output / STAGES
        if self.config.overwrite:
            check_replaceable(self.output.resolve(), overwrite=True)
            shutil.rmtree(self.output, ignore_errors=True)
        elif not mine.is_dir():
            check_replaceable(self.output.resolve(), overwrite=False)
        mine.mkdir(parents=True, exist_ok=True)

    def _bases(self) -> Iterator[_Base]:
        config = self.config.quantization_config
        yield _Base("quantized", _title(config), config)
        if self.config.baseline:
            group = {"group_size": config["group_size"]} if "group_size" in config else {}
            yield _Base("rtn", "3-bit rounding", RTN | group)

    def _recover(self, base: _Base, full: Path) -> tuple[Path, Path] | None:
        """Adds the rows of one quantized model; returns its folder, and that of the first adapter."""
        folder = self.stages.run(
            base.name,
            {"model": self._source_stamp(), "quantization": base.config}
            | _calibration_stamp(base.config)
            | {"special_tokens": self._special_tokens if base.config.get("dataset") else None},
            lambda folder: quantize(self.source, folder / MODEL, dict(base.config), overwrite=True),
        )
        weights, sha256 = folder / MODEL, fingerprint(folder / MODEL)
        self.report.base_sha256 = self.report.base_sha256 or sha256
        measured = self.stages.run(
            f"{base.name}-measured", self._measuring(sha256), self._measures(weights, pool=True)
        )
        lost = self._add(base.title, measured)
        if base.name == "quantized":
            self._round(weights, sha256)
        if self.questions.pool:
            comparison = failures.compare_failures(self.questions.pool, read_pool(full), read_pool(measured))
            self.report.failures[base.name] = comparison.summary()
            _write_lines(self.output / STAGES / f"{base.name}-failures.jsonl", comparison.rows())
            if not comparison.flipped:
                self._note(
                    f"{base.title}: quantization has broken none of the {len(self.questions.pool)} problems of the "
                    "pool. There is nothing to repair, and nothing was trained."
                )
                return None
        else:
            comparison = failures.Comparison([], [], [], [])
        trained = [
            self._train(base, weights, sha256, comparison, size, objective, lost)
            for size in self.config.examples
            for objective in self.config.objectives
        ]
        return weights, trained[0]

    def _round(self, weights: Path, sha256: str) -> None:
        """Adds what 4-bit rounding of the same layers would cost."""
        rounded = self.stages.run(
            "rounded-measured",
            self._measuring(self._source_stamp()) | {"layers": sha256},
            lambda result: measure_rounded(self.source, weights, self.questions, self.config.dtype, result),
        )
        self.report.rounded_perplexity, self.report.rounding_seconds = read_rounded(rounded)

    def _train(
        self,
        base: _Base,
        weights: Path,
        sha256: str,
        comparison: failures.Comparison,
        size: int,
        objective: str,
        lost: Row | None,
    ) -> Path:
        config, name = self.config, f"{base.name}-{size}"
        rows, failing = self._examples(comparison, size)
        shown = [{"text": self.tokenizer.decode(row["input_ids"]), **row} for row in rows]
        _write_lines(self.output / STAGES / f"{name}.jsonl", shown)
        inputs = {
            "weights": sha256,
            "teacher": self._source_stamp(),
            "examples": failures.digest(rows),
            "training": config.training,
            "adapter": [config.lora_r, config.lora_alpha],
            "dtype": config.dtype,
            "seed": config.seed,
        }
        cache = None
        if config.cached_teacher and objective != "sft":
            cache = self.stages.run(
                f"{name}-teacher", inputs, lambda folder: capture(config, weights, self.source, rows, folder)
            )
        trained = self.stages.run(
            f"{name}-{objective}",
            inputs | {"objective": objective, "cached": cache is not None},
            lambda folder: train(config, weights, self.source, rows, objective, folder, cache),
        )
        adapter = json.loads((trained / "manifest.json").read_text())["files"]["adapter/adapter_model.safetensors"]
        measured = self.stages.run(
            f"{name}-{objective}-measured",
            self._measuring(sha256) | {"adapter": adapter["sha256"]},
            self._measures(weights, adapter=trained),
        )
        seconds = json.loads((trained / "training.json").read_text())["seconds"]
        self._add(
            f"{base.title} + LoRA",
            measured,
            lost,
            objective=objective,
            examples=len(rows),
            failing=failing,
            seconds=seconds,
        )
        return trained

    def _examples(self, comparison: failures.Comparison, size: int) -> tuple[list[dict], int]:
        config = self.config
        ordinary = self._windows if config.train_text else comparison.kept
        share = config.failing_share if self.questions.pool else 0.0
        failing, rest = failures.repair_set(comparison.flipped, ordinary, size, share, config.seed)
        rest = rest if config.train_text else failures.problem_rows(self.tokenizer, rest)
        if len(failing) + len(rest) < size:
            self._note(
                f"There are only {len(failing) + len(rest)} of the {size} examples asked for: raise `pool_problems`, "
                "or give more text."
            )
        return failures.problem_rows(self.tokenizer, failing) + rest, len(failing)

    @cached_property
    def _windows(self) -> list[dict]:
        return failures.text_rows(self.tokenizer, self.ordinary_texts, self.config.text_tokens)

    def _measures(self, folder: Path, **options: Any) -> Callable[[Path], None]:
        options["pool"] = options.get("pool", False) and bool(self.questions.pool)
        return lambda result: measure(folder, self.questions, self.config.dtype, result, **options)

    def _measuring(self, weights: Any) -> dict[str, Any]:
        measuring = {"weights": weights, "questions": self._data_digest, "dtype": self.config.dtype}
        return measuring | {"special_tokens": self._special_tokens}

    @cached_property
    def _special_tokens(self) -> list[list[int]] | None:
        """What windows of text begin with: an earlier version left it out, so a stage of that version is done
        again.
        """
        head, tail, _ = special_tokens(self.tokenizer)
        return [head, tail] if head or tail else None

    @cached_property
    def _data_digest(self) -> str:
        return failures.digest(asdict(self.questions))

    def _source_stamp(self) -> dict[str, Any]:
        return file_stamps([self.source / "config.json", *find_weights(self.source).files, *companions(self.source)])

    def _note(self, note: str) -> None:
        if note not in self.report.notes:
            self.report.notes.append(note)
            self.say(note)

    def _add(self, title: str, folder: Path, lost: Row | None = None, **details: Any) -> Row:
        row = Row(title, **asdict(read_measured(folder)), **details)
        full = self.report.rows[0] if self.report.rows else None
        after = row.exact_match
        worst = lost.exact_match if lost else None
        best = full.exact_match if full else None
        if after is not None and worst is not None and best is not None and best > worst:
            row.regained = (after - worst) / (best - worst)
            if row.regained < 0:
                self._note(
                    f"{title} by {row.objective} on {row.examples} examples solves less than without the adapter: do "
                    "not use it; lower `learning_rate` in `training`, or give more examples."
                )
        self.report.rows.append(row)
        return row

    def _package(self, weights: Path, trained: Path) -> None:
        config, destination = self.config, self.output / MODEL
        if not config.merge:
            write_package(destination, weights, trained, config, self.report)
            return
        inputs = {
            "weights": fingerprint(weights),
            "adapter": sha256_file(trained / ADAPTER / "adapter_model.safetensors"),
        }
        merged = self.stages.run(
            "merged", inputs, lambda folder: merged_model(weights, trained, folder / MODEL, config.dtype)
        )
        measured = self.stages.run("merged-measured", self._measuring(inputs), self._measures(merged / MODEL))
        self._add("merged into an ordinary model", measured)
        write_package(destination, merged / MODEL, None, config, self.report)


def _calibration_stamp(config: dict[str, Any]) -> dict[str, str]:
    """The contents of a calibration text, of which the config has no more than the name."""
    data = config.get("dataset")
    return {"calibration": sha256_file(data)} if isinstance(data, str) and Path(data).is_file() else {}


def _title(config: dict[str, Any]) -> str:
    method = find("quantizer", config["quant_method"]).method
    data = ", without data" if method.uncalibrated and not method.is_calibrated(config) else ""
    number = config.get(method.unit, getattr(method.config_class(), method.unit, None)) if method.unit else None
    units = f", {number} {method.unit.removesuffix('s' * (number == 1))}" if number else ""
    return f"{method.name}{units}{data}"


def _name(data: str) -> str:
    return data if data.startswith("tiny:") else Path(data).name


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
