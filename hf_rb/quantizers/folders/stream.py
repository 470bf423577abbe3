"""Quantizes a checkpoint tensor by tensor, without building the model: memory for one tensor, and a run that can be
resumed.

The model exists on the meta device only. Its quantizer decides there what is quantized, and transformers' own renaming
says which parameter a tensor of the files belongs to; the work on one matrix is
`quantizer.quantize_tensor(parameter, module, matrix, place)`, which returns the stored tensors. A method whose tensors
depend on one another may read those of another parameter for that ([`~hf_rb.quantizers.loading.matrices.Place`]).

Beside the destination lies the unfinished work, `.NAME.partial`:

    state.json       what is being done: files, configuration, versions; a run that differs is refused
    parts/           quantized tensors of a shard, about 64 MB of its weights a file, with their errors as metadata
    shards/          the finished shards' errors; a file here means that the shard below is complete
    model/           the folder that becomes the destination

Each of these files appears whole, by a rename, so a run killed at any moment goes on behind the last one of them.
"""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging

from hf_rb import __version__
from hf_rb.evaluation import model_size
from hf_rb.io.files import check_replaceable, publish_folder
from hf_rb.io.model_class import skeleton
from hf_rb.io.parameter_names import ParameterNames
from hf_rb.io.resumable import STATE, file_stamps, finish, partial_folder, unfinished, write_json
from hf_rb.io.safetensors import Checkpoint, Entry, Output, read_header, standard_names, write_index, write_tensors
from hf_rb.io.weight_files import weight_bytes
from hf_rb.quantizers.config import PackedConfig
from hf_rb.quantizers.folders.quantize import complete_folder, open_source
from hf_rb.quantizers.loading.conversion import moves_rows
from hf_rb.quantizers.loading.matrices import Place
from hf_rb.quantizers.packed.report import LayerReport, Report
from hf_rb.quantizers.packed.weight import PackedWeight
from hf_rb.utils.progress import tqdm


__all__ = ["quantize_checkpoint"]

logger = logging.get_logger(__name__)

PART = 1 << 26  # bytes of weights that are quantized between two points from which a run can go on


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    config: PackedConfig | dict[str, Any],
    *,
    overwrite: bool = False,
    dtype: str = "auto",
    resume: bool = True,
    progress: bool = True,
    variant: str | None = None,
    subfolder: str = "",
) -> Report:
    """
    Quantizes a checkpoint shard by shard with the memory of about one tensor. The stored tensors are those of
    [`quantize`].

    The folder appears at `destination` in one step when it is complete. Until then the work lies beside it in a hidden
    folder, from which the same call goes on after it was interrupted or killed.

    Args:
        source (`str` or `Path`):
            Model folder, Hub id or embedded model (`"tiny:student"`) in safetensors files that is not quantized.
        destination (`str` or `Path`):
            Folder to write.
        config ([`PTQTPConfig`] or `dict`):
            Quantization config; as a dict it has the key `quant_method`.
        overwrite, dtype:
            As in [`quantize`].
        resume (`bool`, *optional*, defaults to `True`):
            Whether to go on with unfinished work of an earlier call; `False` throws it away.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar, on a terminal.
        variant, subfolder:
            As in [`quantize`].

    Returns:
        [`Report`]

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model, or it has no safetensors files.
        ValueError: The model is quantized already, its files do not fit its configuration or need a conversion that
            takes more than one tensor, a weight has a NaN, or the unfinished work is of other files or another
            configuration.
    """
    folder, destination, config = open_source(source, destination, config, subfolder)
    destination = destination.resolve()
    checkpoint = Checkpoint(folder, variant)
    streamed = _StreamedModel(folder, checkpoint, config, dtype)
    work = partial_folder(destination)
    if not (work / STATE).is_file():
        shutil.rmtree(work, ignore_errors=True)  # a run that had ended was killed while it cleaned up
        check_replaceable(destination, overwrite)
    state = {
        "files": file_stamps([folder / "config.json", *checkpoint.files]),
        "options": {"dtype": dtype, "hf_rb": __version__} | config.to_dict(),
    }
    with unfinished(work, state, resume, logger):
        result = work / "model"
        if streamed.is_done(work) and not result.exists():  # it was killed after the result had got its name
            size = model_size(destination)
        else:
            check_replaceable(destination, overwrite)
            streamed.write(work, progress)
            size = complete_folder(result, folder, source, destination.name, config)
            publish_folder(result, destination, overwrite)
        report = streamed.report(work)
        finish(work)
    report.set_size(size, weight_bytes(folder, variant))
    return report


@dataclass(frozen=True)
class _Job:
    """One tensor of the files, called `name` in the result; it becomes `parameter` of the model, in `dtype`."""

    name: str
    entry: Entry
    parameter: str
    dtype: torch.dtype
    quantized: bool
    part: int = 0  # of those that are joined row by row

    @property
    def expert(self) -> int | None:
        """Number in the name that the parameter's name has not."""
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", self.name)
        return int(numbers[-1]) if len(numbers) > len(re.findall(r"(?<=\.)\d+(?=\.)", self.parameter)) else None


class _StreamedModel:
    """Plans what happens to each tensor of a checkpoint, and carries the plan out."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, config: PackedConfig, dtype: str):
        self.quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        self.quantizer.validate_environment(device_map=None, weights_only=True)
        model_config = AutoConfig.from_pretrained(folder)
        self.dtype = self.quantizer.update_dtype(_load_dtype(model_config, checkpoint, dtype))
        self.model = skeleton(model_config, self.dtype)
        self.needs_generation_config = self.model.can_generate() and not (folder / "generation_config.json").is_file()
        self.shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        needed = {name for name, _ in self.model.named_parameters()}
        self.quantizer.preprocess_model(
            model=self.model, dtype=self.dtype, device_map=None, checkpoint_files=checkpoint.files
        )
        self.quantizer.prepare_streaming(self.model)
        found = self.quantizer.report
        self.beside = {"skipped": found.skipped, "readers": found.readers, "allocation": found.allocation}

        jobs = _without_tied_copies(self._jobs(checkpoint, needed), self.model.all_tied_weights_keys)
        self.by_parameter: dict[str, list[_Job]] = {}
        for job in jobs:
            self.by_parameter.setdefault(job.parameter, []).append(job)
        by_file = [[job for job in jobs if job.entry.file == file] for file in checkpoint.files]
        by_file = [jobs for jobs in by_file if jobs]
        self.shards = dict(zip(standard_names(len(by_file)), by_file, strict=True))

    def _jobs(self, checkpoint: Checkpoint, needed: set[str]) -> list[_Job]:
        model, find = self.model, ParameterNames(self.model)
        kept_dtypes = model._get_dtype_plan(self.dtype)
        jobs, unexpected, found = [], [], Counter()
        for name, entry in checkpoint.entries.items():
            parameters, converter, result, part = find(name)
            if not parameters:
                unexpected.append(name)
                continue
            found.update(dict.fromkeys(parameters, math.prod(entry.shape)))
            parameter = parameters[0]
            quantized = any(self.quantizer.streams(model, one) for one in parameters)
            if quantized and converter and not moves_rows(converter):
                names = ", ".join(type(operation).__name__ for operation in converter.operations)
                raise ValueError(
                    f"{name} is turned into {', '.join(parameters)} by {names} while it loads, which streaming "
                    "cannot do. Quantize this model in memory, without `--stream`."
                )
            if not converter and entry.shape != self.shapes[parameter]:
                raise ValueError(f"{name} has shape {entry.shape}, {type(model).__name__} {self.shapes[parameter]}.")
            dtype = self.dtype if quantized else model.get_parameter_or_buffer(parameter).dtype
            kept = (kept for pattern, kept in kept_dtypes.items() if re.search(pattern.replace("*", ".*"), parameter))
            dtype = next(kept, dtype)
            jobs.append(_Job(result, entry, parameter, dtype, quantized, part))
        self._check(jobs, found, needed)
        if unexpected := [name for name in unexpected if not _ignored(model._keys_to_ignore_on_load_unexpected, name)]:
            logger.warning(f"{type(model).__name__} has no place for {_some(unexpected)}: left out.")
        return [job for job in jobs if job.parameter not in (model._keys_to_ignore_on_save or ())]

    def _check(self, jobs: list[_Job], found: Counter, needed: set[str]) -> None:
        model, tied = self.model, self.model.all_tied_weights_keys
        present = {tied.get(name, name) for name in found}
        missing = sorted(name for name in needed if tied.get(name, name) not in present)
        if missing := [name for name in missing if not _ignored(model._keys_to_ignore_on_load_missing, name)]:
            raise ValueError(f"The files have no {_some(missing)}, which {type(model).__name__} needs.")
        for job in jobs:
            weights, expected = found[job.parameter], math.prod(self.shapes[job.parameter])
            if job.quantized and weights != expected:
                raise ValueError(f"The files hold {weights:,} of the {expected:,} weights of {job.parameter}.")

    def is_done(self, work: Path) -> bool:
        return all(_done(work, shard).is_file() for shard in self.shards)

    def write(self, work: Path, progress: bool) -> None:
        """Writes the model's files, except for what [`complete_folder`] adds."""
        for name in ("parts", "shards", "model"):
            (work / name).mkdir(exist_ok=True)
        ends = list(accumulate(sum(job.entry.nbytes for job in jobs) for jobs in self.shards.values()))
        bar = tqdm(total=ends[-1], unit="B", unit_scale=True, desc="quantize", disable=None if progress else True)
        with bar, torch.inference_mode():
            for end, (shard, jobs) in zip(ends, self.shards.items(), strict=True):
                if not _done(work, shard).is_file():
                    self._write_shard(work, shard, jobs, bar)
                bar.update(end - bar.n)
        for path in (work / "model").iterdir():
            if path.name not in self.shards:
                path.unlink()  # half a file, perhaps, of a run that was killed here
        config = self.model.config
        config.quantization_config = self.quantizer.quantization_config
        config.architectures = [type(self.model).__name__]
        config.save_pretrained(work / "model")
        if self.needs_generation_config:
            self.model.generation_config.save_pretrained(work / "model")
        if len(self.shards) > 1:
            write_index(work / "model", list(self.shards))

    def _write_shard(self, work: Path, shard: str, jobs: list[_Job], bar: tqdm) -> None:
        outputs = {job.name: Output.copy(job.entry, job.dtype) for job in jobs if not job.quantized}
        parts, reports = [], []
        for number, batch in enumerate(_batches([job for job in jobs if job.quantized])):
            parts.append(work / "parts" / f"{shard}-{number}")
            if not parts[-1].is_file():
                self._write_part(parts[-1], batch, bar)
            entries, metadata = read_header(parts[-1])
            outputs |= {name: Output.copy(entry) for name, entry in entries.items()}
            reports.append(json.loads(metadata["report"]))
        write_tensors(work / "model" / shard, outputs)
        write_json(_done(work, shard), reports)
        for part in parts:
            part.unlink()

    def _write_part(self, path: Path, jobs: list[_Job], bar: tqdm) -> None:
        outputs = {}
        report = self.quantizer.report = Report(self.quantizer.quantization_config.quant_method)
        for job in jobs:
            try:
                tensors = self._quantize(job)
            except ValueError as error:
                raise ValueError(f"{job.name}: {error}") from error
            outputs |= {name: Output.of(tensor) for name, tensor in tensors.items()}
            bar.update(job.entry.nbytes)
        metadata = {
            "report": json.dumps({"layers": [asdict(one) for one in report.layers], "seconds": report.seconds})
        }
        write_tensors(path, outputs, metadata)

    def _quantize(self, job: _Job) -> dict[str, Tensor]:
        """Returns the stored tensors by name."""
        module = self.model.get_submodule(job.parameter.rpartition(".")[0])
        if len(job.entry.shape) < 3:
            place = Place(job.expert, job.part * job.entry.shape[0], lambda other: self._read(other, job.expert))
            tensor = job.entry.read().to(job.dtype)
            if tensor.ndim == 1:
                return {job.name: self.quantizer.scale_bias(job.parameter, tensor, place)}
            matrix = tensor.T if module.is_transposed else tensor
            return self.quantizer.quantize_tensor(job.parameter, module, matrix, place).named(job.name)
        # The experts of a layer in one tensor, (experts, out, in) or (experts, in, out).
        experts = []
        for index in range(job.entry.shape[0]):
            matrix = job.entry.read(index).to(job.dtype)
            matrix = matrix.T if module.is_transposed else matrix
            place = Place(index, 0, lambda other, index=index: self._read(other, index))
            experts.append(self.quantizer.quantize_tensor(job.parameter, module, matrix, place))
        return PackedWeight.join(experts, torch.stack).named(job.name)

    def _read(self, parameter: str, expert: int | None) -> Tensor:
        """Returns the matrix of another parameter, or that of one of its experts."""
        jobs = self.by_parameter[parameter]
        job = next((job for job in jobs if job.expert == expert), jobs[0])
        matrix = job.entry.read(*[expert] * (len(job.entry.shape) == 3)).to(job.dtype)
        return matrix.T if self.model.get_submodule(parameter.rpartition(".")[0]).is_transposed else matrix

    def report(self, work: Path) -> Report:
        """Returns the report of all shards, those of earlier processes too."""
        method = self.quantizer.quantization_config.quant_method
        report = Report(method, **self.beside)
        for shard in self.shards:
            for part in json.loads(_done(work, shard).read_text()):
                layers = [LayerReport(**layer) for layer in part["layers"]]
                report.merge(Report(report.method, layers, seconds=part["seconds"]))
        report.layers.sort(key=lambda layer: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", layer.name)])
        return report


def _without_tied_copies(jobs: list[_Job], tied: dict[str, str]) -> list[_Job]:
    """Keeps one of each pair of tied tensors under the name that `save_pretrained` gives it; where they differ,
    both.
    """
    by_parameter = {job.parameter: job for job in jobs}
    for copy, kept in tied.items():
        if copy in by_parameter and kept not in by_parameter:
            jobs = [replace(job, name=kept, parameter=kept) if job.parameter == copy else job for job in jobs]
        elif copy in by_parameter:
            pairs = zip(by_parameter[copy].entry.chunks(), by_parameter[kept].entry.chunks(), strict=True)
            if all(torch.equal(*pair) for pair in pairs):
                jobs = [job for job in jobs if job.parameter != copy]
    return jobs


def _load_dtype(config: PreTrainedConfig, checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """The type that `from_pretrained(..., dtype=dtype)` would choose."""
    chosen: torch.dtype | str = dtype
    if dtype == "auto":
        chosen = config.dtype or next(
            entry.dtype for entry in checkpoint.entries.values() if entry.dtype.is_floating_point
        )
    return getattr(torch, chosen) if isinstance(chosen, str) else chosen


def _batches(jobs: list[_Job]) -> Iterator[list[_Job]]:
    batch, size = [], 0
    for job in jobs:
        if batch and size + job.entry.nbytes > PART:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job.entry.nbytes
    if batch:
        yield batch


def _done(work: Path, shard: str) -> Path:
    return work / "shards" / f"{shard}.json"


def _ignored(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
