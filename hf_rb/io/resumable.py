"""Long work that writes a folder and goes on where it was interrupted or killed.

The work lies in a hidden folder beside its destination, `.NAME.partial`, with `state.json` saying what is being done:
which files are read, with which options. A call that differs is refused, another process is kept out by a lock, and
what a folder without a state holds means nothing.
"""

import json
import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_rb.io.files import fsync_file


__all__ = ["LOCK", "STATE", "file_stamps", "finish", "partial_folder", "unfinished", "write_json"]

STATE, LOCK = "state.json", "lock"


def partial_folder(destination: Path) -> Path:
    """Returns where the unfinished work of a destination lies."""
    return destination.with_name(f".{destination.name}.partial")


def file_stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Returns size and time of change of each file: what a state says about the files that are read."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


@contextmanager
def unfinished(work: Path, state: dict[str, dict[str, Any]], resume: bool, logger: Any) -> Generator[None]:
    """
    Context manager that keeps other processes and other runs out of the folder of the unfinished work.

    Args:
        work (`Path`):
            The folder. It is created, and emptied unless its state is this one.
        state (`dict`):
            `{"files": {name: stamp}, "options": {name: value}}`, as JSON has it: what must not change between two
            parts of a run.
        resume (`bool`):
            Whether to go on with what is there; `False` throws it away.
        logger:
            Says where the work is when the block raises.

    Raises:
        ValueError: The unfinished work is another one, or another process is at it.
    """
    state = json.loads(json.dumps(state))
    created = not work.exists()
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / LOCK, timeout=0):
            if resume and (work / STATE).is_file() and _has_work(work):
                _compare(json.loads((work / STATE).read_text(encoding="utf-8")), state, work)
            else:
                (work / STATE).unlink(missing_ok=True)  # first: what is left without it means nothing
                for path in work.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name != LOCK:
                        path.unlink()
                write_json(work / STATE, state)
            try:
                yield
            except BaseException:
                if _has_work(work):
                    logger.warning(f"What is done is kept in {work}; the same call goes on from there.")
                elif created:
                    finish(work)  # a call that was refused leaves nothing
                raise
    except Timeout:
        raise ValueError(
            f"Another process is at work in {work}. Wait for it, or choose another destination."
        ) from None


def finish(work: Path) -> None:
    """Removes the folder when its result has got its name. Call it within [`unfinished`]."""
    (work / STATE).unlink()
    shutil.rmtree(work, ignore_errors=True)


def _has_work(work: Path) -> bool:
    """Returns whether anything is done."""
    return any(path.is_file() and path.name not in (STATE, LOCK) for path in work.rglob("*"))


def _compare(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]], work: Path) -> None:
    files = [name for name in old["files"] | new["files"] if old["files"].get(name) != new["files"].get(name)]
    changes = [f"{', '.join(files)} changed"] if files else []
    for name in old["options"] | new["options"]:
        before, now = old["options"].get(name), new["options"].get(name)
        if before != now:
            changes.append(f"{name} was {before!r} and is {now!r}")
    if changes:
        raise ValueError(
            f"The unfinished work in {work} does not belong to this call: {'; '.join(changes)}. Repeat the call that "
            "began it, or throw it away: `resume=False` (`--no-resume`), or delete the folder."
        )


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is either whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    fsync_file(temporary)
    os.replace(temporary, path)
    fsync_file(path.parent)
