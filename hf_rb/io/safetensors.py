"""Safetensors checkpoints read and written in pieces: whatever their size, no more than one tensor is in memory.

Files are read with plain reads. A memory map would be simpler, but what it has touched counts as memory of the
process.
"""

import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rb.io.files import fsync_file
from hf_rb.io.weight_files import INDEX, SINGLE, weight_files


__all__ = [
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "Entry",
    "Output",
    "TensorFile",
    "read_header",
    "standard_names",
    "write_index",
    "write_tensors",
]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 22  # bytes


@dataclass(frozen=True)
class Entry:
    """Place of a tensor: `nbytes` bytes of `file` from byte `start` on."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, index: int | None = None) -> Tensor:
        """Returns the tensor, or `tensor[index]` without reading the rest."""
        shape, start, nbytes = self.shape, self.start, self.nbytes
        if index is not None:
            shape, nbytes = shape[1:], nbytes // shape[0]
            start += index * nbytes
        if not nbytes:
            return torch.empty(shape, dtype=self.dtype)
        data = torch.empty(nbytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as stream:
            _read_into(stream, start, data)
        return data.view(self.dtype).view(shape)

    def chunks(self, dtype: torch.dtype | None = None, elements: int | None = None) -> Iterator[Tensor]:
        """Yields the tensor, cast to `dtype`, as flat pieces of about 4 MB, or of that many elements."""
        step = elements * self.dtype.itemsize if elements else CHUNK
        with self.file.open("rb", buffering=0) as stream:
            for start in range(0, self.nbytes, step):
                data = torch.empty(min(step, self.nbytes - start), dtype=torch.uint8)
                _read_into(stream, self.start + start, data)
                yield data.view(self.dtype).to(dtype or self.dtype)


def _read_into(stream: Any, start: int, data: Tensor) -> None:
    stream.seek(start)
    view = data.numpy().data
    while view:  # one call reads at most 2 GB
        count = stream.readinto(view)
        if not count:
            raise ValueError(f"{stream.name} is truncated: copy or download it again.")
        view = view[count:]


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns the tensors of a file by name, and its metadata.

    Raises:
        ValueError: It is not in the safetensors format, or truncated.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if length > size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {name: _entry(file, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a safetensors file, or it is truncated ({error}).") from error
    for name, entry in entries.items():
        if entry.start + entry.nbytes > size:
            raise ValueError(f"{file} is truncated: {name} ends behind its end. Copy or download it again.")
    return entries, metadata


def _entry(file: Path, entry: dict, offset: int) -> Entry:
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown type {entry['dtype']}")
    return Entry(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), offset + start, stop - start)


class Checkpoint:
    """
    The tensors of a model folder, in one file or in shards: those that `from_pretrained` loads.

    Args:
        folder (`Path`):
            Model folder.
        variant (`str`, *optional*), subfolder (`str`, *optional*, defaults to `""`):
            As in [`find_weights`].

    Attributes:
        files (`list[Path]`): The weight files.
        shards (`list[dict[str, Entry]]`): Their tensors by name, a file each; one that two files hold is in the last
            one.
        entries (`dict[str, Entry]`): The tensors of all files.
        lost (`list[str]`): What the index lists and no file holds.

    Raises:
        FileNotFoundError, ValueError: As [`weight_files`], or a file is damaged.
    """

    def __init__(self, folder: Path, variant: str | None = None, subfolder: str = ""):
        found = weight_files(folder, variant, subfolder)
        shards = {file: read_header(file)[0] for file in found.files}
        self.entries = {name: entry for shard in shards.values() for name, entry in shard.items()}
        for shard in shards.values():
            for name in [name for name, entry in shard.items() if self.entries[name] is not entry]:
                del shard[name]
        shards = {file: shard for file, shard in shards.items() if shard}
        self.files, self.shards = list(shards), list(shards.values())
        listed = json.loads(found.index.read_text(encoding="utf-8"))["weight_map"] if found.index else {}
        self.lost = sorted(listed.keys() - self.entries.keys())


@dataclass(frozen=True)
class Output:
    """A tensor to be written; `chunks` yields it, in order, as flat tensors of its type."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> "Output":
        return cls(tensor.dtype, tuple(tensor.shape), lambda: iter([tensor.contiguous().view(-1)]))

    @classmethod
    def copy(cls, entry: Entry, dtype: torch.dtype | None = None) -> "Output":
        """The tensor of another file, cast to `dtype`."""
        return cls(dtype or entry.dtype, entry.shape, lambda: entry.chunks(dtype))


class TensorFile:
    """
    A safetensors file that is written from its beginning to its end, tensor after tensor.

    Args:
        path (`Path`):
            The file.
        tensors (`dict[str, tuple[torch.dtype, tuple[int, ...]]]`):
            Type and shape of every tensor.
        metadata (`dict[str, str]`, *optional*):
            What else the header says.

    Attributes:
        names (`list[str]`): The tensors in the order in which they lie in the file.
        offsets (`list[int]`): Where each of them begins, and at last the size of the file, in bytes.
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: dict[str, str] | None = None,
    ):
        # The format's own order: the widest types first, so that every tensor begins at a multiple of its item size.
        self.path, self.names = path, sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
        stops = [0]
        for name in self.names:
            dtype, shape = tensors[name]
            stops.append(stops[-1] + torch.Size(shape).numel() * dtype.itemsize)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": stops[-2:]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.offsets = [len(self.header) + stop for stop in stops]

    @contextmanager
    def writing(self, done: int = 0) -> Generator["TensorFile"]:
        """Opens the file, behind its first `done` tensors if there are any from an earlier time.

        Raises:
            ValueError: They are not there.
        """
        with self.path.open("r+b" if done else "wb", buffering=0) as self._stream:
            if not done:
                _write_all(self._stream, memoryview(self.header))
            elif self._stream.seek(0, os.SEEK_END) < self.offsets[done]:
                raise ValueError(f"{self.path} is shorter than what was written into it.")
            self._stream.truncate(self.offsets[done])
            self._stream.seek(self.offsets[done])
            yield self

    def write(self, chunk: Tensor) -> None:
        """Writes the next flat piece of a tensor."""
        _write_all(self._stream, chunk.view(torch.uint8).numpy().data)

    def check(self, done: int) -> None:
        """Raises `RuntimeError` unless exactly the first `done` tensors have been written."""
        if self._stream.tell() != self.offsets[done]:
            raise RuntimeError(f"{self.path}: the tensors do not have the size of their shapes.")

    def sync(self) -> None:
        """Waits until what has been written is on disk."""
        os.fsync(self._stream.fileno())


def write_tensors(path: Path, outputs: dict[str, Output], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that is there only when it is complete, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    tensors = {name: (output.dtype, output.shape) for name, output in outputs.items()}
    with TensorFile(temporary, tensors, metadata).writing() as file:
        for name in file.names:
            for chunk in outputs[name].chunks():
                file.write(chunk)
        file.check(len(file.names))
        file.sync()
    os.replace(temporary, path)
    fsync_file(path.parent)


def _write_all(stream: Any, view: memoryview) -> None:
    while view:
        view = view[stream.write(view) :]


def standard_names(count: int) -> list[str]:
    """Returns the names of so many weight files, as `save_pretrained` gives them."""
    return [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def write_index(folder: Path, files: list[str]) -> None:
    """Writes the index of a checkpoint that consists of several files of `folder`."""
    headers = {file: read_header(folder / file)[0] for file in files}
    size = sum(entry.nbytes for entries in headers.values() for entry in entries.values())
    weight_map = {name: file for file, entries in headers.items() for name in entries}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
