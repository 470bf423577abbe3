"""Writes a checkpoint that is made from several, piece by piece: no model is built, and no tensor is in memory as a
whole.

One of the models receives: the result has its tensors, their names, shapes and files. An [`Operation`] says for one
tensor how its pieces become those of the result, or of several results at a time, one for each lambda of a sweep.

Every file is written from its beginning to its end, so that its length says how far the work has come. Beside the
destination lies `.NAME.partial` with the state (see `hf_rb.io.resumable`), the folder `model` that becomes the
destination, and `journal.jsonl`: a line every 64 MB or 10 seconds, written after the files are on disk, with how many
tensors of which file are complete and what they measured. A run that was killed goes on behind the last line.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_rb import __version__
from hf_rb.hub import ModelCardData, write_model_card
from hf_rb.io.files import check_replaceable, publish_folder
from hf_rb.io.model_folder import check_apart, copy_companions, public_name
from hf_rb.io.resumable import STATE, finish, partial_folder, unfinished, write_json
from hf_rb.io.safetensors import TensorFile, read_header, write_index
from hf_rb.methods.registry import catalog
from hf_rb.utils.progress import tqdm
from hf_rb.weights.journal import Journal
from hf_rb.weights.operation import Job, Operation
from hf_rb.weights.options import Options
from hf_rb.weights.plan import MergePlan
from hf_rb.weights.report import MergeReport, TensorReport
from hf_rb.weights.source import Source, holds_own_head, says_tied
from hf_rb.weights.sweep import REPORT, sweep_folder


__all__ = ["merge"]

logger = logging.getLogger(__name__)

SYNC_BYTES, SYNC_SECONDS = 1 << 26, 10.0


def merge(operation: Operation, sources: Sequence[Source], destination: str | Path, options: Options) -> MergeReport:
    """Runs an operation over the files of its models, the receiving one first. Returns and raises as
    [`~hf_rb.weights.merge_models`].
    """
    started = time.monotonic()
    destination = Path(destination).resolve()
    for source in sources:
        check_apart(source.folder, destination)
    plan = MergePlan(operation, sources, options)
    writer = _Writer(plan)
    work = partial_folder(destination)
    if not (work / STATE).is_file():
        check_replaceable(destination, options.overwrite)
    with unfinished(work, plan.state(), options.resume, logger):
        journal = Journal(work / "journal.jsonl")
        if journal.done < len(plan.shards) or (work / "model").exists():  # else killed after the result got its name
            check_replaceable(destination, options.overwrite)
            writer.write(work / "model", journal, options.progress)
        report = writer.report(journal)
        if (work / "model").exists():
            report.seconds = time.monotonic() - started
            report.file_bytes = writer.complete(work / "model", destination.name, report)
            publish_folder(work / "model", destination, options.overwrite)
        finish(work)
    return report


class _Writer:
    """Writes what a plan says: the weights piece by piece, and what else belongs to a model."""

    def __init__(self, plan: MergePlan):
        self.plan = plan

    def folders(self, folder: Path) -> list[Path]:
        sweep = self.plan.operation.sweep
        return [folder] if sweep is None else [sweep_folder(folder, lam) for lam in sweep]

    def write(self, folder: Path, journal: Journal, progress: bool) -> None:
        """Writes the weight files, from where the journal ends."""
        for one in self.folders(folder):
            one.mkdir(parents=True, exist_ok=True)
        total = sum(job.entry.nbytes for jobs in self.plan.shards for job in jobs)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=None if progress else True)
        with bar, torch.inference_mode():
            for number, jobs in enumerate(self.plan.shards):
                if number < journal.done:
                    bar.update(sum(job.entry.nbytes for job in jobs))
                else:
                    self._write_shard(folder, number, journal, bar)

    def _write_shard(self, folder: Path, number: int, journal: Journal, bar: tqdm) -> None:
        jobs = {job.name: job for job in self.plan.shards[number]}
        tensors = {name: (job.dtype, job.entry.shape) for name, job in jobs.items()}
        paths = [one / self.plan.names[number] for one in self.folders(folder)]
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
            for piece in self.plan.operation.pieces(job):
                for file, result in zip(files, piece.results, strict=True):
                    file.write(result.view(-1))
                count += piece.results[0].numel()
                for key, value in piece.sums.items():
                    sums[key] += value
                if piece.row or count == weights:
                    measured = self._measured(sums) | dict(piece.values)
                    rows.append(TensorReport(job.name + (piece.row or ""), count, measured=measured))
                    weights, count, sums = weights - count, 0, Counter()
        except ValueError as error:
            raise ValueError(f"{job.name}: {error}") from error
        return rows

    def _measured(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {
            key: value if key in ("sigma", "absolute") else (torch.as_tensor(value) ** 0.5).tolist()
            for key, value in sums.items()
        }
        if "sigma" in values:
            values["sigma"] = values["sigma"] / values["absolute"] if values["absolute"] else 0.0
        if "change" in values and self.plan.operation.sweep is None:
            (values["change"],) = values["change"]
        return values

    def report(self, journal: Journal) -> MergeReport:
        return MergeReport(
            self.plan.operation.method.key,
            {source.role: public_name(source.name) for source in self.plan.sources},
            self.plan.giver.role,
            {
                "include": self.plan.include,
                "mismatch": self.plan.options.mismatch,
                **self.plan.operation.options(),
            },
            journal.rows,
            self.plan.dropped,
            [*self.plan.notes, *self.plan.operation.notes(journal.rows)],
        )

    def complete(self, folder: Path, name: str, report: MergeReport) -> int:
        """Adds to the weights what else belongs to a model, and returns the bytes of one result's weights."""
        for one, lam in zip(self.folders(folder), self.plan.operation.sweep or (None,), strict=True):
            if len(self.plan.names) > 1:
                write_index(one, self.plan.names)
            config = self.plan.config(untied=self._unties(one))
            (one / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            copy_companions(self.plan.giver.folder, one)
            shown = report.models | report.options | ({} if lam is None else {"lambda": lam})
            card = ModelCardData(
                name if lam is None else one.name,
                [key for key in [self.plan.operation.method.key] if key in catalog()],
                base_model=[source.name for source in self.plan.sources],
                hyperparameters={key: value for key, value in shown.items() if value not in (None, {}, "refuse")},
                tags=["merge"],
            )
            write_model_card(one, card)
        size = sum((self.folders(folder)[0] / file).stat().st_size for file in self.plan.names)
        report.file_bytes = size
        for one in {folder, *self.folders(folder)}:
            write_json(one / REPORT, {"format_version": 1, "hf_rb": __version__} | asdict(report))
        return size

    def _unties(self, folder: Path) -> bool:
        """Returns whether a result of a model that ties its head holds a head of other values than the embedding."""
        if says_tied(self.plan.receiver.config) is False:
            return False
        return holds_own_head({k: v for name in self.plan.names for k, v in read_header(folder / name)[0].items()})
