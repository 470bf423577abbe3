"""The stages of a long run: each has a folder, and is done again only where something that goes into it has
changed.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_rb.io.files import sha256_file, verify_manifest, write_manifest
from hf_rb.io.resumable import write_json
from hf_rb.io.weight_files import find_weights


__all__ = ["Stages", "fingerprint"]

INPUTS = "inputs.json"


def fingerprint(folder: str | Path) -> str:
    """Returns the SHA-256 of the contents of a model's weight files, whatever they are called."""
    from hashlib import sha256

    hashes = [sha256_file(file) for file in find_weights(folder).files]
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()


class Stages:
    """
    Folders of stages below `root`.

    A stage says what goes into it, as JSON. It is complete when `manifest.json`, written last, lists what it has left
    and all of that is there unchanged. An incomplete one with the same inputs goes on in its folder; one with other
    inputs begins anew.

    Args:
        root (`Path`):
            Folder of the stages.
        say (`Callable[[str], None]`):
            Gets a line about every stage.
    """

    def __init__(self, root: Path, say: Callable[[str], None]):
        self.root, self.say = root, say

    def run(self, name: str, inputs: dict[str, Any], work: Callable[[Path], object]) -> Path:
        """Does a stage unless it is done, and returns its folder. `work` gets the folder to write into."""
        folder, inputs = self.root / name, json.loads(json.dumps(inputs))
        changes = _changes(folder, inputs)
        if not changes and not verify_manifest(folder):
            self.say(f"{name}: done before")
            return folder
        if changes:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / INPUTS, inputs)
        self.say(f"{name}{changes if isinstance(changes, str) else ''} …")
        started = time.monotonic()
        work(folder)
        write_manifest(folder)
        self.say(f"{name}: {time.monotonic() - started:.1f} s")
        return folder


def _changes(folder: Path, inputs: dict[str, Any]) -> str | bool:
    """`False` if a folder was begun with these inputs, `True` if never, or else which of them differ."""
    if not (folder / INPUTS).is_file():
        return True
    before = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
    names = [name for name in before | inputs if before.get(name) != inputs.get(name)]
    return f", again ({', '.join(names)} changed)" if names else False
