"""Files that are either whole or absent: folders that appear in one step, and a manifest that says what a whole one
holds.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


__all__ = [
    "MANIFEST",
    "atomic_folder",
    "check_new_file",
    "check_replaceable",
    "fsync_file",
    "fsync_folder",
    "publish_folder",
    "sha256_file",
    "start_manifest",
    "verify_manifest",
    "write_manifest",
]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
WINDOWS = os.name == "nt"


def fsync_file(path: str | os.PathLike) -> None:
    """Waits until the contents of a file (or the entries of a folder) are on disk."""
    # Windows opens no folder, and syncs a file only through a descriptor that may write.
    if WINDOWS and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: str | os.PathLike) -> None:
    """Waits until every file below `folder`, and every folder entry, is on disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync_file(os.path.join(root, name))
        fsync_file(root)


def sha256_file(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's contents in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_folder(destination: str | os.PathLike, overwrite: bool = False) -> Generator[Path]:
    """
    Context manager for writing a folder that appears at `destination` only when it is complete.

    Yields an empty temporary folder beside `destination`. When the block ends, everything in it is synced to disk and
    the folder takes its final name; when the block raises, the temporary folder is removed and `destination` stays as
    it was.

    Args:
        destination (`str` or `os.PathLike`):
            Where the folder must appear. Parents are created.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a non-empty folder at `destination` is replaced as a whole. An empty one always is.

    Raises:
        FileExistsError: `destination` is a file, or a non-empty folder and `overwrite` is `False`.
        ValueError: Overwriting would remove the current or the home folder.

    Example:

    ```python
    >>> with atomic_folder("out/model") as folder:
    ...     model.save_pretrained(folder)
    ```
    """
    # A link keeps pointing at its target, which is what gets replaced.
    destination = Path(destination).resolve()
    check_replaceable(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as the destination, so that the final rename is one atomic step.
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".tmp", dir=destination.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private to the user
        publish_folder(folder, destination, overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, destination: Path, overwrite: bool = False) -> None:
    """Syncs a complete folder to disk and gives it its final name, on the same file system.

    Raises:
        FileExistsError, ValueError: As [`atomic_folder`] does.
    """
    fsync_folder(folder)
    check_replaceable(destination, overwrite)  # somebody may have written there in the meantime
    _move_into_place(folder, destination)
    fsync_file(destination.parent)


def check_replaceable(destination: Path, overwrite: bool) -> None:
    """Raises what [`atomic_folder`] would raise for this destination."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise FileExistsError(f"{destination} is a file. Give the path of a folder that does not exist yet.")
    if any(place.is_relative_to(destination) for place in (Path.cwd(), Path.home())):
        raise ValueError(
            f"{destination} holds the current or the home folder. Give the path of a folder for the result alone."
        )
    if any(destination.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{destination} is not empty. Choose another folder, or pass `--overwrite` to replace it."
        )


def check_new_file(path: str | os.PathLike, option: str, overwrite: bool) -> None:
    """Refuses a file that cannot be written, or that is there and is not to be replaced; `option` is the argument that
    names it.

    Raises:
        FileNotFoundError: There is no such folder.
        FileExistsError: The file is there and `overwrite` is `False`.
    """
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already. Choose another {option}, or pass --overwrite.")


def _move_into_place(folder: Path, destination: Path) -> None:
    if not destination.exists():
        os.replace(folder, destination)
        return
    # A rename cannot replace a non-empty folder: the old one steps aside, and comes back if the second rename fails.
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".old", dir=destination.parent))
    old = aside / destination.name  # a new name, since Windows replaces no folder, an empty one neither
    try:
        os.replace(destination, old)
        try:
            os.replace(folder, destination)
        except OSError:
            os.replace(old, destination)
            raise
    finally:
        if destination.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def start_manifest(folder: str | os.PathLike) -> None:
    """Marks a folder as unfinished until [`write_manifest`] is called; creates it where necessary."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _replace_manifest(Path(folder), files=None)


def write_manifest(folder: str | os.PathLike) -> Path:
    """
    Writes `manifest.json`, the list of every file below `folder` with its size in bytes and its SHA-256.

    The files are synced to disk first and the manifest is written last, so a folder with a manifest that
    [`verify_manifest`] accepts is complete even after a power cut.

    Returns:
        `Path`: The manifest's path.
    """
    folder = Path(folder)
    fsync_folder(folder)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    _replace_manifest(folder, files)
    return folder / MANIFEST


def _replace_manifest(folder: Path, files: dict | None) -> None:
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=2) + "\n")
    fsync_file(temporary)
    os.replace(temporary, folder / MANIFEST)
    fsync_file(folder)


def verify_manifest(folder: str | os.PathLike) -> list[str]:
    """
    Compares a folder with its manifest.

    Files that the manifest does not list are ignored.

    Returns:
        `list[str]`: One line a problem, each beginning with the file's name; empty for a complete folder.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["format_version"], manifest["files"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is damaged"]
    if version != FORMAT_VERSION:
        return [f"{MANIFEST} has format version {version}, this hf_rb reads {FORMAT_VERSION}"]
    if files is None:
        return [f"{MANIFEST} says that the files are not all written"]
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        elif sha256_file(path) != expected["sha256"]:
            problems.append(f"{name} has changed (its SHA-256 differs)")
    return problems
