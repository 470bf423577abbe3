import threading
from pathlib import Path

import pytest

from hf_rb.io import native


SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C file, and an empty cache."""
    monkeypatch.setenv("HF_RB_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "answer.c"
    file.write_text(SOURCE)
    return file


@pytest.fixture
def compiled(monkeypatch):
    """The C files that are compiled, in order."""
    compile, seen = native._compile, []

    def count(command, source, library):
        seen.append(source)
        compile(command, source, library)

    monkeypatch.setattr(native, "_compile", count)
    return seen


def again(source, variant="portable"):
    """Loads as another process would."""
    native._load.cache_clear()
    return native.load(source, variant)


@pytest.mark.parametrize("variant", native.supported())
def test_library_is_built_once(source, compiled, variant):
    assert native.load(source, variant).answer() == 42
    assert again(source, variant).answer() == 42
    assert compiled == [source]


def test_another_source_is_another_library(source, compiled):
    native.load(source, "portable")
    source.write_text(SOURCE.replace("42", "43"))
    assert again(source).answer() == 43 and len(compiled) == 2


def test_another_compiler_is_another_library(source, compiled, tmp_path, monkeypatch):
    native.load(source, "portable")
    script = tmp_path / "mycc"
    script.write_text('#!/bin/sh\nexec cc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    assert again(source).answer() == 42 and len(compiled) == 2


def test_compiler_with_a_launcher(source, compiled, tmp_path, monkeypatch):
    for name, line in [("launch", 'exec "$@"'), ("mycc", 'exec cc "$@"')]:
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CC", f"{tmp_path}/launch {tmp_path}/mycc -DSPEED=1")
    assert native.load(source, "portable").answer() == 42
    assert again(source).answer() == 42 and len(compiled) == 1
    (tmp_path / "mycc").write_text('#!/bin/sh\nexec gcc -O1 "$@"\n')  # another compiler behind the same launcher
    assert again(source).answer() == 42 and len(compiled) == 2


@pytest.mark.parametrize(
    "compiler, match", [("nothing gcc", "CC is 'nothing gcc', which is not found"), ("'gcc", "No closing quotation")]
)
def test_compiler_that_is_not_there(source, monkeypatch, compiler, match):
    monkeypatch.setenv("CC", compiler)
    fails(source, match)


def test_many_threads_build_once(source, compiled):
    results = []
    threads = [threading.Thread(target=lambda: results.append(native.load(source, "portable"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [library.answer() for library in results] == [42] * 4 and len(compiled) == 1


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-1] + b"x"]
)
def test_damaged_library_is_built_again(source, compiled, tmp_path, damage):
    native.load(source, "portable")
    (library,) = (tmp_path / "cache").glob("answer-*.so")
    # A new file: the old one is still mapped into this process.
    data = library.read_bytes()
    library.unlink()
    library.write_bytes(damage(data))
    assert again(source).answer() == 42 and len(compiled) == 2


def test_build_without_openmp(source, monkeypatch):
    run, commands = native.subprocess.run, []

    def without_openmp(command, **options):
        commands.append(command)
        return run(["false"] if "-fopenmp" in command else command, **options)

    monkeypatch.setattr(native.subprocess, "run", without_openmp)
    assert native.load(source, "portable").answer() == 42 and len(commands) == 2


def fails(source, match):
    """There is one warning, and no library."""
    with pytest.warns(RuntimeWarning, match=match) as warnings:
        assert native.load(source, "portable") is None
        assert native.load(source, "portable") is None
    assert len(warnings) == 1


def test_no_compiler(source, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    fails(source, "there is no C compiler")


def test_build_that_fails(source):
    source.write_text("int answer(void) { return")
    fails(source, "answer.c could not be compiled.*cc ended with 1: .*error: expected")


def test_compiler_that_fails(source, monkeypatch):
    monkeypatch.setenv("CC", "false")
    fails(source, "false ended with 1: no message")


def test_cache_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder, reason in [("file/cache", "Not a directory"), ("file", "File exists")]:
        monkeypatch.setenv("HF_RB_CACHE", str(tmp_path / folder))
        fails(source, f"could not be compiled.*{reason}.*set HF_RB_CACHE")


def test_library_that_cannot_be_loaded(source, monkeypatch):
    def nonsense(command, source, library):
        library.write_bytes(b"nonsense")
        native._checksum_file(library).write_text(native._checksum(library))

    monkeypatch.setattr(native, "_compile", nonsense)
    fails(source, "could not be compiled")


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("HF_RB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert native._cache_folder() == Path("/somewhere/hf_rb")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native._cache_folder() == Path.home() / ".cache" / "hf_rb"


def test_forced_variant(source, monkeypatch):
    monkeypatch.delenv("HF_RB_NATIVE", raising=False)
    assert native.variant() == native.supported()[0]
    monkeypatch.setenv("HF_RB_NATIVE", "portable")
    assert native.variant() == "portable"
    monkeypatch.setenv("HF_RB_NATIVE", "off")
    assert native.load(source, native.variant()) is None
    monkeypatch.setenv("HF_RB_NATIVE", "sse9")
    with pytest.raises(ValueError, match="'sse9'; this processor has .*portable, off"):
        native.variant()
