import os

import pytest

from hf_rb.io import files
from hf_rb.io.files import MANIFEST, atomic_folder, start_manifest, verify_manifest, write_manifest


def fill(folder, text="weights"):
    (folder / "sub").mkdir()
    (folder / "model.bin").write_text(text)
    (folder / "sub" / "state.json").write_text("{}")


def test_atomic_folder_appears_whole(tmp_path):
    destination = tmp_path / "deep" / "model"
    with atomic_folder(destination) as folder:
        fill(folder)
        assert not destination.exists()
    assert (destination / "sub" / "state.json").read_text() == "{}"
    assert os.listdir(destination.parent) == ["model"]
    assert destination.stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_atomic_folder_leaves_nothing_behind_when_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as folder:
        fill(folder)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_atomic_folder_refuses_what_exists(tmp_path, monkeypatch):
    destination = tmp_path / "model"
    destination.mkdir()
    with atomic_folder(destination) as folder:  # an empty folder is nothing to lose
        fill(folder, "old")
    with pytest.raises(FileExistsError, match="pass `--overwrite`"), atomic_folder(destination):
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError), atomic_folder(destination, overwrite=True) as folder:
        raise RuntimeError
    assert (destination / "model.bin").read_text() == "old"
    with atomic_folder(destination, overwrite=True) as folder:
        (folder / "new.bin").write_text("new")
    assert os.listdir(destination) == ["new.bin"]
    assert os.listdir(tmp_path) == ["model"]

    with pytest.raises(FileExistsError, match="is a file"), atomic_folder(destination / "new.bin", overwrite=True):
        pass
    monkeypatch.chdir(destination)
    with pytest.raises(ValueError, match="the current or the home folder"), atomic_folder("..", overwrite=True):
        pass


def test_manifest_names_every_kind_of_damage(tmp_path):
    assert verify_manifest(tmp_path) == [f"{MANIFEST} is missing"]
    fill(tmp_path)
    start_manifest(tmp_path)
    assert verify_manifest(tmp_path) == [f"{MANIFEST} says that the files are not all written"]
    write_manifest(tmp_path)
    write_manifest(tmp_path)  # a second one does not list the first
    (tmp_path / "extra.txt").write_text("written later, not attested")
    assert verify_manifest(tmp_path) == []

    (tmp_path / "model.bin").write_text("weight")
    (tmp_path / "sub" / "state.json").unlink()
    assert verify_manifest(tmp_path) == ["model.bin has 6 bytes instead of 7", "sub/state.json is missing"]
    (tmp_path / "model.bin").write_text("weighty"[:7].replace("y", "z"))
    assert verify_manifest(tmp_path)[0] == "model.bin has changed (its SHA-256 differs)"

    (tmp_path / MANIFEST).write_text("{")
    assert verify_manifest(tmp_path) == [f"{MANIFEST} is damaged"]
    (tmp_path / MANIFEST).write_text('{"format_version": 2, "files": {}}')
    assert "format version 2" in verify_manifest(tmp_path)[0]


def test_fsync_folder_on_windows_opens_no_folder(tmp_path, monkeypatch):
    """Windows refuses to open a folder, and to sync a descriptor that only reads."""
    opened = []

    def refusing_open(path, flags):
        assert not os.path.isdir(path) and flags & os.O_RDWR
        opened.append(os.path.basename(path))
        return real_open(path, flags)

    real_open = os.open
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("text")
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", refusing_open)
    files.fsync_folder(tmp_path)
    assert opened == ["file"]


def test_a_folder_is_replaced_where_no_rename_replaces_one(tmp_path, monkeypatch):
    """As on Windows, where even an empty folder must not be in the way of another."""
    rename, fails = os.replace, []

    def replace(source, target):
        if os.path.isdir(target) or (fails and os.path.samefile(os.path.dirname(source), tmp_path) and fails.pop()):
            raise PermissionError(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "result", overwrite=True) as folder:
            (folder / "file").write_text(text)
        assert (tmp_path / "result" / "file").read_text() == text and len(list(tmp_path.iterdir())) == 1
    fails[:] = [True, False]  # the old folder goes aside, the new one does not come
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "result", overwrite=True) as folder:
        (folder / "file").write_text("third")
    assert (tmp_path / "result" / "file").read_text() == "second" and len(list(tmp_path.iterdir())) == 1
