"""C files of the package, compiled when they are first needed.

A C file is built by the system's compiler in about a second, kept in a cache, and loaded with ctypes; it sees pointers
and sizes, never torch. There is one build for each instruction set: the same source is compiled with the flags of the
best set that the processor has. What is in the cache is keyed by the source, the compiler and the flags.

Without a compiler, or without a place to write, there is one warning, and every caller has a path in torch.

Environment variables: `HF_RB_CACHE` is the folder of the cache (default: `hf_rb` in the user's cache folder);
`HF_RB_NATIVE` forces an instruction set of [`VARIANTS`], or `off`; `CC` is the compiler, with arguments if there are
any (`ccache gcc`).
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

from filelock import FileLock


__all__ = ["VARIANTS", "compiler", "load", "supported", "variant"]

# Flags of /proc/cpuinfo that an instruction set needs, and those that the compiler gets, the best first.
VARIANTS = {
    "avx512vnni": (
        "avx512f avx512bw avx512dq avx512vl avx512_vnni avx2 fma f16c",
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c",
    ),
    "avx2": ("avx2 fma f16c", "-mavx2 -mfma -mf16c"),
    "portable": ("", ""),
}
# No contraction: a build with fused multiply-adds must give the bits of one without.
FLAGS = "-std=gnu11 -O3 -shared -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
SUFFIX = "dylib" if sys.platform == "darwin" else "so"


def load(source: Path, variant: str) -> ctypes.CDLL | None:
    """
    Returns the library built from a C file, or `None` after one warning when that is not possible.

    Args:
        source (`pathlib.Path`):
            The C file. It may not include other files of ours.
        variant (`str`):
            One of [`VARIANTS`], or `"off"`, which returns `None`.
    """
    # The folder is an argument so that another `HF_RB_CACHE` is another library.
    return None if variant == "off" else _load(source, variant, _cache_folder())


def variant() -> str:
    """Returns the instruction set that libraries are built for: that of `HF_RB_NATIVE`, or the best that there is."""
    forced = os.environ.get("HF_RB_NATIVE")
    if not forced:
        return supported()[0]
    if forced != "off" and forced not in supported():
        known = ", ".join([*supported(), "off"])
        raise ValueError(f"HF_RB_NATIVE is {forced!r}; this processor has {known}.")
    return forced


@cache
def supported() -> list[str]:
    """Returns the instruction sets of this processor, the best first."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return [name for name, (needed, _) in VARIANTS.items() if flags.issuperset(needed.split())]


@cache
def _load(source: Path, variant: str, folder: Path) -> ctypes.CDLL | None:
    try:
        return _build(source, variant, folder)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        warnings.warn(
            f"{source.name} could not be compiled, slower torch code takes its place: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _build(source: Path, variant: str, folder: Path) -> ctypes.CDLL:
    command, flags = compiler(), FLAGS + VARIANTS[variant][1].split()
    identity = [*map(_identity, command), platform.machine(), *flags]
    key = hashlib.sha256(source.read_bytes() + repr(identity).encode()).hexdigest()[:20]
    library = folder / f"{source.stem}-{variant}-{key}.{SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"{folder} cannot be a folder ({error.strerror}); set HF_RB_CACHE to one that can."
        ) from error
    with FileLock(f"{library}.lock", timeout=300):
        if not _is_whole(library):
            _compile([*command, *flags], source, library)
        return ctypes.CDLL(str(library))


def compiler() -> list[str]:
    """
    Returns the command of the C compiler.

    Raises:
        RuntimeError: There is none.
    """
    chosen = os.environ.get("CC", "").strip()
    try:
        commands = [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]
    except ValueError as error:
        raise RuntimeError(f"CC is {chosen!r}, which is no command: {error}.") from error
    for program, *arguments in commands:
        if found := shutil.which(program):
            return [found, *arguments]
    raise RuntimeError(f"CC is {chosen!r}, which is not found." if chosen else "there is no C compiler (set CC).")


def _identity(word: str) -> tuple:
    """Returns a value that changes when a word of the compiler's command means another program (`gcc` in `ccache
    gcc`).
    """
    if (program := shutil.which(word)) is None:
        return (word,)
    found = os.stat(program)
    return os.path.realpath(program), found.st_size, found.st_mtime_ns


def _compile(command: list[str], source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        result = Path(folder) / library.name
        # OpenMP shares its threads with torch. Without it (Apple's clang) the code is the same on one thread.
        for openmp in (["-fopenmp"], []):
            done = subprocess.run(
                [*command, *openmp, str(source), "-o", str(result), "-lm"], capture_output=True, text=True, timeout=300
            )
            if done.returncode == 0:
                break
        else:
            lines = done.stderr.strip().splitlines() or ["no message"]
            line = next((line for line in lines if "error" in line), lines[-1])
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {line}")
        _checksum_file(library).write_text(_checksum(result))
        os.replace(result, library)


def _is_whole(library: Path) -> bool:
    """A library that was cut short would end the process when it is loaded."""
    try:
        return _checksum_file(library).read_text() == _checksum(library)
    except OSError:
        return False


def _checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _cache_folder() -> Path:
    folder = os.environ.get("HF_RB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_rb")
    return Path(folder)
