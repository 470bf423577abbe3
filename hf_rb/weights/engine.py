"""Writes a checkpoint that is made from several, piece by piece: no model is built, and no tensor is in memory as a whole.

One of the models receives: the result has its tensors, their names, shapes and files. An [`Operation`] says for one tensor
how its pieces become those of the result, or of several results at a time, one for each lambda of a sweep.

Every file is written from its beginning to its end, so that its length says how far the work has come. Beside the destination
lies `.NAME.partial` with the state (see `hf_rb.io.resumable`), the folder `model` that becomes the destination, and
`journal.jsonl`: a line every 64 MB or 10 seconds, written after the files are on disk, with how many tensors of which file are
complete and what they measured. A run that was killed goes on behind the last line.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rb import __version__
from hf_rb.hub import ModelCardData, write_model_card
from hf_rb.io.files import check_replaceable, publish_folder
from hf_rb.io.model_folder import check_apart, companions, copy_companions, public_name
from hf_rb.io.resumable import STATE, file_stamps, finish, partial_folder, unfinished, write_json
from hf_rb.io.safetensors import Entry, TensorFile, read_header, standard_names, write_index
from hf_rb.io.skeleton import loading_problem
from hf_rb.utils.progress import tqdm
from hf_rb.weights.patterns import matcher, select
from hf_rb.weights.reasons import difference, padding
from hf_rb.weights.report import MergeReport, TensorReport
from hf_rb.weights.source import (
    EMBEDDINGS,
    HEADS,
    TIE,
    Source,
    content,
    holds_own_head,
    says_tied,
    some,
    vocabulary_problem,
    with_ties_of,
)
from hf_rb.weights.sweep import REPORT, sweep_folder


__all__ = [
    "ELEMENTS",
    "Job",
    "Operation",
    "Options",
    "Piece",
    "Source",
    "check_lambdas",
    "measure",
    "merge",
    "pieces",
    "public_name",
    "vocabulary_problem",
]

logger = logging.getLogger(__name__)

ELEMENTS = 1 << 18  # of a piece: small enough for a processor's cache
SYNC_BYTES, SYNC_SECONDS = 1 << 26, 10.0
# What a configuration says beside what the model computes.
SILENT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class Job:
    """A tensor of the result: the receiving model's `entry`, those of the other models by role, and its type.

    `kept` says why it is copied; then there are no others.
    """

    name: str
    entry: Entry
    others: Mapping[str, Entry]
    dtype: torch.dtype
    kept: str | None = None


@dataclass(frozen=True)
class Piece:
    """A flat piece of each result, rounded to the job's type, with what was measured on it.

    `sums` are added up over the pieces of a tensor. `row` ends a row of the report: the name it gets, behind the tensor's, and values that are
    no sums.
    """

    results: Sequence[Tensor]
    sums: Mapping[str, Any]
    row: tuple[str, dict[str, Any]] | None = None


class Operation:
    """
    What is done to one tensor. A method is a subclass.

    Attributes:
        method (`str`): Key in `hf_rb.hub.METHODS`.
        files_from (`tuple[str, ...]`): Roles of the models whose configuration, tokenizer and so on the result may get.
        sweep (`tuple[float, ...]`, *optional*): The lambdas of several results; `None` for one result.
    """

    method: str
    files_from: tuple[str, ...]
    sweep: tuple[float, ...] | None = None

    def keeps(self, name: str, entry: Entry) -> str | None:
        """Why a tensor that the user has included is copied nevertheless."""
        return None

    def dtype(self, entry: Entry, others: Mapping[str, Entry]) -> torch.dtype:
        """Type of the result."""
        return entry.dtype

    def pieces(self, job: Job) -> Iterator[Piece]:
        """Yields the tensor's pieces in order."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """What was asked for, for the report."""
        return {}

    def notes(self, rows: list[TensorReport]) -> list[str]:
        """What a user should know about what came of it."""
        return []


@dataclass(frozen=True)
class Options:
    """What all operations take; see [`~hf_rb.weights.interpolate`]."""

    include: str
    mismatch: str = "refuse"
    files_from: str | None = None
    dtype: str | None = None
    overwrite: bool = False
    resume: bool = True
    progress: bool = True

    def __post_init__(self):
        if self.mismatch not in ("refuse", "skip"):
            raise ValueError(f"`mismatch` cannot be {self.mismatch!r}; write 'refuse' or 'skip'.")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"`dtype` cannot be {self.dtype!r}; write 'float32', 'bfloat16' or 'float16', or leave it out."
            )


def check_lambdas(lam: float | Sequence[float], extrapolate: bool) -> tuple[float, ...]:
    """Returns the lambdas as a tuple.

    Raises:
        ValueError: There is none, two are equal, or one is outside [0, 1] and `extrapolate` is `False`.
    """
    lams = (lam,) if isinstance(lam, int | float) else tuple(lam)
    if not lams or len({f"{value:g}" for value in lams}) < len(lams):
        raise ValueError(f"`lam` is {lam!r}: give one value, or several different ones for a sweep.")
    for value in lams:
        if not float("-inf") < value < float("inf"):
            raise ValueError(f"lambda is {value}; write a number in [0, 1].")
        if not (extrapolate or 0 <= value <= 1):
            raise ValueError(
                f"lambda is {value}, which is outside [0, 1] and extrapolates. Write a value in [0, 1], or say that it is "
                "meant with `extrapolate=True` (`--extrapolate`)."
            )
    return lams


def pieces(*entries: Entry) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same flat piece of several tensors in float32 (float64 stays), after having looked for NaN and infinity."""
    dtype = torch.float64 if any(entry.dtype == torch.float64 for entry in entries) else torch.float32
    for parts in zip(*(entry.chunks(dtype, ELEMENTS) for entry in entries), strict=True):
        for entry, part in zip(entries, parts, strict=True):
            check_finite(part, str(entry.file))
        yield parts


def check_finite(values: Tensor, where: str) -> None:
    # A sum of squares is not finite if any value is not: one fast pass, and a second one only if it overflowed.
    if not torch.dot(values.view(-1), values.view(-1)).isfinite() and not values.isfinite().all():
        raise ValueError(
            f"{where} holds NaN or infinity. Look for the step that made it; such a model computes nothing."
        )


def measure(receiving: Tensor, one: Tensor, other: Tensor, results: Sequence[Tensor]) -> dict[str, Any]:
    """Returns the sums behind the norms of [`MergeReport`], `one` and `other` being the models that are compared."""
    difference = one - other
    changes = [square(result.to(receiving.dtype).view(-1) - receiving) for result in results]
    if not all(map(isfinite, changes)):
        raise ValueError(
            f'the result is too large for {results[0].dtype}. Write `dtype="float32"` (`--dtype float32`).'
        )
    return {
        "norm": square(receiving),
        "difference": square(difference),
        "change": torch.tensor(changes, dtype=torch.float64),
        "sigma": difference.abs().sum().item(),
        "absolute": (one.abs().sum() + other.abs().sum()).item(),
    }


def square(values: Tensor) -> float:
    return torch.dot(values.view(-1), values.view(-1)).item()


def merge(operation: Operation, sources: Sequence[Source], destination: str | Path, options: Options) -> MergeReport:
    """
    Runs an operation over the files of its models, the receiving one first.

    Returns:
        [`MergeReport`]

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        ValueError: The models do not fit together, a weight is NaN or infinite, the destination holds one of the models,
            or the unfinished work beside it is another one.
    """
    started = time.monotonic()
    destination = Path(destination).resolve()
    for source in sources:
        check_apart(source.folder, destination)
    plan = _Plan(operation, sources, options)
    work = partial_folder(destination)
    if not (work / STATE).is_file():
        check_replaceable(destination, options.overwrite)
    with unfinished(work, plan.state(), options.resume, logger):
        journal = _Journal(work / "journal.jsonl")
        if journal.done < len(plan.shards) or (work / "model").exists():  # else killed after the result got its name
            check_replaceable(destination, options.overwrite)
            plan.write(work / "model", journal, options.progress)
        report = plan.report(journal)
        if (work / "model").exists():
            report.seconds = time.monotonic() - started
            report.file_bytes = plan.complete(work / "model", destination.name, report)
            publish_folder(work / "model", destination, options.overwrite)
        finish(work)
    return report


class _Journal:
    """How far the work has come: `done` files, and `tensors` of the next one; and what was measured."""

    def __init__(self, path: Path):
        self.path, self.done, self.tensors, self.rows = path, 0, 0, []
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole, newline, _ = text.rpartition("\n")  # behind the last newline lies what a kill has cut off
        for line in whole.splitlines():
            entry = json.loads(line)
            self.done, self.tensors = entry["done"], entry["tensors"]
            self.rows += [TensorReport(**row) for row in entry["rows"]]
        if path.is_file():
            os.truncate(path, len((whole + newline).encode()))

    def add(self, done: int, tensors: int, rows: list[TensorReport]) -> None:
        self.done, self.tensors = done, tensors
        self.rows += rows
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"done": done, "tensors": tensors, "rows": [asdict(row) for row in rows]}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class _Plan:
    """What becomes of every tensor, decided from the headers of the files before anything is written."""

    def __init__(self, operation: Operation, sources: Sequence[Source], options: Options):
        self.operation, self.sources, self.options = operation, sources, options
        self.receiver, self.others = sources[0], sources[1:]
        self.notes: list[str] = []
        self.untied = False
        self._check_architecture()
        self._give_head()
        included = select(options.include, self.receiver.entries)
        self.dropped = self._extra()
        kept = self._kept(included)
        self.shards = [
            [self._job(name, entry, kept) for name, entry in shard.items()] for shard in self.receiver.shards
        ]
        self.names = standard_names(len(self.shards))
        self.files_from = self._files_from()
        self.giver = next(source for source in sources if source.role == self.files_from)
        self._check_loading()

    def _refuse(self, problem: str, remedy: str, other: Source | None = None) -> None:
        """Raises, or notes the problem; `other` is a model in which the receiving one does not find its tensors, or the other way round."""
        if self.options.mismatch == "refuse":
            raise ValueError(other and difference(self.receiver, other) or f"{problem}. {remedy}")
        self.notes.append(f"{problem}.")

    def _check_architecture(self) -> None:
        ours = self.receiver.config
        for other in self.others:
            if (theirs := other.config.get("model_type")) != ours.get("model_type"):
                self._refuse(
                    f"{self.receiver.role} is a {ours.get('model_type')} model and {other.role} a {theirs} model",
                    'Give models of one architecture, or `mismatch="skip"` (`--mismatch skip`) to merge the tensors that fit.',
                )

    def _give_head(self) -> None:
        """Gives a receiving model that ties its head a head of its own, where another model has one that is merged."""
        for other in self.others:
            for name in filter(matcher(self.options.include), list(other.entries)):
                ours = self.receiver.name_of(name) if name.endswith(HEADS) else None
                if ours and ours.endswith(EMBEDDINGS) and other.own_head(name, ours):
                    self.receiver.untie(name)
                    self.untied = True
                    self.notes.append(
                        f"{self.receiver.role} ties its head to the embedding, {other.role} does not: the result has {name} for a head of "
                        f"its own, and {self.receiver.role} puts {ours} into it."
                    )

    def _extra(self) -> list[str]:
        """Names that only other models have."""
        extra = []
        for other in self.others:
            known = filter(matcher(self.options.include), other.entries)
            names = [name for name in known if self.receiver.name_of(name) is None]
            if names:
                self._refuse(
                    f"{self.receiver.role} has no {some(names)}, which {other.role} has",
                    'Give models of one shape, choose tensors with `include` (`--include`), or leave these out with `mismatch="skip"` '
                    "(`--mismatch skip`).",
                    other,
                )
            extra += names
        return sorted(set(extra))

    def _kept(self, included: set[str]) -> dict[str, str]:
        """Why tensors are copied from the receiving model."""
        kept = {name: "not included" for name in self.receiver.entries if name not in included}
        for name in included:
            if reason := self.operation.keeps(name, self.receiver.entries[name]):
                kept[name] = reason
        own = set(kept.values())
        vocabulary = next(filter(None, (vocabulary_problem(self.receiver, other) for other in self.others)), None)
        embeddings = {name for name in included - kept.keys() if name.endswith(EMBEDDINGS + HEADS)}
        if vocabulary and embeddings:
            self._refuse(
                vocabulary,
                'Their rows would mix different tokens. Give models with one tokenizer, or `mismatch="skip"` (`--mismatch skip`) to keep '
                f"the embeddings of {self.receiver.role}.",
            )
            kept |= dict.fromkeys(embeddings, "another vocabulary")
        for other in self.others:
            wanted = sorted(included - kept.keys())
            missing = [name for name in wanted if other.find(name) is None]
            shapes = [
                name
                for name in wanted
                if (entry := other.find(name)) and entry.shape != self.receiver.entries[name].shape
            ]
            if missing:
                self._refuse(
                    f"{other.role} has no {some(missing)}, which {self.receiver.role} has",
                    "Give models of one shape, choose tensors with `include` (`--include`), or keep these of "
                    f'{self.receiver.role} with `mismatch="skip"` (`--mismatch skip`).',
                    other,
                )
                kept |= dict.fromkeys(missing, f"not in {other.role}")
            if shapes:
                name = shapes[0]
                self._refuse(
                    f"{some(shapes)} differs in shape: {self.receiver.entries[name].shape} in {self.receiver.role}, "
                    f"{other.find(name).shape} in {other.role}",
                    padding(self.receiver, other, name)
                    or 'Give models of one shape, or keep what differs with `mismatch="skip"` (`--mismatch skip`).',
                )
                kept |= dict.fromkeys(shapes, f"another shape in {other.role}")
        if included <= kept.keys():
            raise ValueError(f"Nothing is left to merge: {'; '.join(sorted(set(kept.values())))}.")
        self.skipped = bool(set(kept.values()) - own)
        return kept

    def _job(self, name: str, entry: Entry, kept: dict[str, str]) -> Job:
        others = {other.role: other.find(name) for other in self.others}
        reason = kept.get(name)
        if reason is None and not entry.dtype.is_floating_point:
            for other in self.others:
                if any(
                    not torch.equal(*pair) for pair in zip(entry.chunks(), others[other.role].chunks(), strict=True)
                ):
                    raise ValueError(
                        f"{name} holds integers that differ between {self.receiver.role} and {other.role}."
                    )
            reason = "integers"
        dtype = entry.dtype
        if entry.dtype.is_floating_point:
            if self.options.dtype:
                dtype = getattr(torch, self.options.dtype)
            elif reason is None:
                dtype = self.operation.dtype(entry, others)
        return Job(name, entry, {} if reason else others, dtype, reason)

    def _files_from(self) -> str:
        """Role of the model that everything but the weights comes from."""
        roles = [source.role for source in self.sources]
        chosen, choices = self.options.files_from, self.operation.files_from
        if len(choices) == 1:
            return choices[0]
        if chosen is not None and chosen not in choices:
            raise ValueError(f"`files_from` cannot be {chosen!r}; write {' or '.join(map(repr, choices))}.")
        if chosen is None and (different := self._different_files()):
            raise ValueError(
                f"{' and '.join(choices)} have different {', '.join(different)}. Say whose configuration, tokenizer, chat template "
                f'and generation config the result gets: `files_from="{choices[-1]}"` (`--files-from {choices[-1]}`) or '
                f"`{choices[0]}`."
            )
        chosen = chosen or choices[0]
        if self.skipped and chosen != roles[0]:
            raise ValueError(
                f"The result has the shapes of {roles[0]}, since tensors that do not fit are skipped; it cannot have the files of "
                f'{chosen}. Write `files_from="{roles[0]}"` (`--files-from {roles[0]}`).'
            )
        return chosen

    def _different_files(self) -> list[str]:
        ours, theirs = ({file.name: file for file in companions(source.folder)} for source in self.sources)
        different = [
            name
            for name in sorted(ours.keys() | theirs.keys())
            if not name.startswith(("LICENSE", "NOTICE"))
            and (name not in ours or name not in theirs or content(ours[name]) != content(theirs[name]))
        ]
        configs = [{k: v for k, v in source.config.items() if k not in SILENT} for source in self.sources]
        return (["config.json"] if configs[0] != configs[1] else []) + different

    def _check_loading(self) -> None:
        """Refuses a result that lacks a parameter: where no model has its configuration and its tensors, transformers is asked."""
        config = self._config(untied=self.untied)
        for source in self.sources:
            alike = _telling(source.config) == _telling(config)
            if alike and source.entries.keys() == self.receiver.entries.keys():
                return
        if problem := loading_problem(config, self.receiver.entries):
            raise ValueError(
                f"The result, with the tensors of {self.receiver.role} and the configuration of {self.files_from}, would be no whole model: "
                f'{problem}. Write `files_from="{self.receiver.role}"` (`--files-from {self.receiver.role}`), or save both models with one '
                "version of transformers (`save_pretrained`)."
            )

    def state(self) -> dict[str, dict[str, Any]]:
        """What must not change between two parts of a run."""
        files = {}
        for source in self.sources:
            stamps = file_stamps([source.folder / "config.json", *source.files])
            files |= {f"{source.role}/{name}": stamp for name, stamp in stamps.items()}
        asked = {
            key: value for key, value in asdict(self.options).items() if key not in ("overwrite", "resume", "progress")
        }
        models = {source.role: str(source.folder) for source in self.sources}
        return {
            "files": files,
            "options": {
                "method": self.operation.method,
                "hf_rb": __version__,
                **models,
                **asked,
                **self.operation.options(),
            },
        }

    def folders(self, folder: Path) -> list[Path]:
        sweep = self.operation.sweep
        return [folder] if sweep is None else [sweep_folder(folder, lam) for lam in sweep]

    def write(self, folder: Path, journal: _Journal, progress: bool) -> None:
        """Writes the weight files, from where the journal ends."""
        for one in self.folders(folder):
            one.mkdir(parents=True, exist_ok=True)
        total = sum(job.entry.nbytes for jobs in self.shards for job in jobs)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=None if progress else True)
        with bar, torch.inference_mode():
            for number, jobs in enumerate(self.shards):
                if number < journal.done:
                    bar.update(sum(job.entry.nbytes for job in jobs))
                else:
                    self._write_shard(folder, number, journal, bar)

    def _write_shard(self, folder: Path, number: int, journal: _Journal, bar: tqdm) -> None:
        jobs = {job.name: job for job in self.shards[number]}
        tensors = {name: (job.dtype, job.entry.shape) for name, job in jobs.items()}
        paths = [one / self.names[number] for one in self.folders(folder)]
        rows, size, synced = [], 0, time.monotonic()
        with ExitStack() as stack:
            files = [stack.enter_context(TensorFile(path, tensors).writing(journal.tensors)) for path in paths]
            names = files[0].names
            bar.update(sum(jobs[name].entry.nbytes for name in names[: journal.tensors]))
            for done, name in enumerate(names[journal.tensors :], start=journal.tensors + 1):
                rows += self._write_tensor(jobs[name], files)
                bar.update(jobs[name].entry.nbytes)
                size += jobs[name].entry.nbytes
                if done < len(names) and size < SYNC_BYTES and time.monotonic() - synced < SYNC_SECONDS:
                    continue
                for file in files:
                    file.check(done)
                    file.sync()
                last = done == len(names)
                journal.add(number + last, 0 if last else done, rows)
                rows, size, synced = [], 0, time.monotonic()

    def _write_tensor(self, job: Job, files: list[TensorFile]) -> list[TensorReport]:
        weights = torch.Size(job.entry.shape).numel()
        if job.kept:
            for chunk in job.entry.chunks(job.dtype):
                for file in files:
                    file.write(chunk)
            return [TensorReport(job.name, weights, job.kept)]
        rows, sums, count = [], Counter(), 0
        try:
            for piece in self.operation.pieces(job):
                for file, result in zip(files, piece.results, strict=True):
                    file.write(result.view(-1))
                count += piece.results[0].numel()
                for key, value in piece.sums.items():
                    sums[key] += value
                if piece.row or count == weights:
                    suffix, values = piece.row or ("", {})
                    rows.append(TensorReport(job.name + suffix, count, measured=self._measured(sums) | values))
                    weights, count, sums = weights - count, 0, Counter()
        except ValueError as error:
            raise ValueError(f"{job.name}: {error}") from error
        return rows

    def _measured(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        values = {
            key: value if key in ("sigma", "absolute") else (torch.as_tensor(value) ** 0.5).tolist()
            for key, value in sums.items()
        }
        if "sigma" in values:
            values["sigma"] = values["sigma"] / values["absolute"] if values["absolute"] else 0.0
        if "change" in values and self.operation.sweep is None:
            (values["change"],) = values["change"]
        return values

    def report(self, journal: _Journal) -> MergeReport:
        return MergeReport(
            self.operation.method,
            {source.role: public_name(source.name) for source in self.sources},
            self.files_from,
            {"include": self.options.include, "mismatch": self.options.mismatch, **self.operation.options()},
            journal.rows,
            self.dropped,
            [*self.notes, *self.operation.notes(journal.rows)],
        )

    def complete(self, folder: Path, name: str, report: MergeReport) -> int:
        """Adds to the weights what else belongs to a model, and returns the bytes of one result's weights."""
        for one, lam in zip(self.folders(folder), self.operation.sweep or (None,), strict=True):
            if len(self.names) > 1:
                write_index(one, self.names)
            config = self._config(untied=self._unties(one))
            (one / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            copy_companions(self.giver.folder, one)
            shown = report.models | report.options | ({} if lam is None else {"lambda": lam})
            card = ModelCardData(
                name if lam is None else one.name,
                [self.operation.method],
                base_model=[source.name for source in self.sources],
                hyperparameters={key: value for key, value in shown.items() if value not in (None, {}, "refuse")},
                tags=["merge"],
            )
            write_model_card(one, card)
        size = sum((self.folders(folder)[0] / file).stat().st_size for file in self.names)
        report.file_bytes = size
        for one in {folder, *self.folders(folder)}:
            write_json(one / REPORT, {"format_version": 1, "hf_rb": __version__} | asdict(report))
        return size

    def _unties(self, folder: Path) -> bool:
        """Whether a result of a model that ties its head holds a head of other values than the embedding."""
        if says_tied(self.receiver.config) is False:
            return False
        return holds_own_head({k: v for name in self.names for k, v in read_header(folder / name)[0].items()})

    def _config(self, untied: bool) -> dict[str, Any]:
        """The configuration of the result, which ties its head as the receiving model does unless it holds a head of its own."""
        counts = Counter()
        for job in (job for jobs in self.shards for job in jobs if job.dtype.is_floating_point):
            counts[job.dtype] += torch.Size(job.entry.shape).numel()
        dtype = str(counts.most_common(1)[0][0]).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in self.giver.config else "dtype"
        config = with_ties_of(self.giver.config, None if untied else self.receiver.config) | {key: dtype}
        config.pop("transformers_weights", None)  # the files of the result have the usual names
        return config


def _telling(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration says which tensors the model needs; a head that is not tied needs no mention."""
    silent = SILENT - {"architectures"}
    return {key: value for key, value in config.items() if key not in silent and (key, value) != (TIE, False)}
