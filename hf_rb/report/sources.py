"""Files of a run's or a model's folder that a report can show. Only JSON, Parquet and Markdown are read, and no model
is loaded.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rb.io.model_folder import public_name


__all__ = ["Source", "read_source"]

STATE, TOKENS = "trainer_state.json", "token_samples.json"
# Files of a model, which say nothing of how it was made.
IGNORED = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
LARGEST = 50_000_000  # bytes of a JSON file that is looked at
NAMES = ("model", "data", "task", "text", "eval_data")  # keys of files that may name a folder of this machine
ROWS = 20_000  # completions, the last ones


@dataclass
class Source:
    """
    Contents of one argument of `hf-rb report`.

    Attributes:
        name (`str`): Name of the folder or the file.
        log (`list[dict]`): `log_history` of the run.
        tokens (`dict`): What [`~hf_rb.trainers.common.token_samples.TokenSamplesCallback`] has written.
        completions (`list[dict]`): The table of completions of a GRPO run, its last rows.
        documents (`dict[str, dict]`): The other JSON files, by name.
        card (`str`): The model card, without its head.
    """

    name: str
    log: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, Any] = field(default_factory=dict)
    completions: list[dict[str, Any]] = field(default_factory=list)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    card: str = ""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Returns the steps and the values of a logged number."""
        entries = [entry for entry in self.log if isinstance(entry.get(key), (int, float)) and "step" in entry]
        return [entry["step"] for entry in entries], [entry[key] for entry in entries]

    def keys(self, *prefixes: str) -> list[str]:
        """Returns the names of logged numbers that begin with one of the prefixes, in the order in which they came."""
        return [key for key in dict.fromkeys(key for entry in self.log for key in entry) if key.startswith(prefixes)]

    def find(self, *keys: str) -> list[dict[str, Any]]:
        """Returns the JSON files that have all of these keys."""
        return [document for document in self.documents.values() if document.keys() >= set(keys)]


def read_source(path: str | Path) -> Source:
    """
    Reads the folder of a run or a model, or one JSON file that a verb has written (`--out`, `--json`).

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: A file is broken; the message names it.
    """
    path = Path(path)
    if path.is_file():
        document = _object(path)
        if "log_history" in document:
            return Source(path.resolve().parent.name, log=_log(path, document))
        return Source(path.name, documents={path.name: document})
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no folder or file {path}. Write the `output_dir` of a run, the folder of a model, or a JSON "
            "file that `hf-rb eval --out` or `hf-rb router-report --out` has written."
        )
    source = Source(path.resolve().name)
    for file in sorted(path.glob("*.json")):
        if file.name in IGNORED or file.name.endswith(".index.json") or file.stat().st_size > LARGEST:
            continue
        if file.name == TOKENS:
            source.tokens = _object(file)
        elif file.name != STATE:
            source.documents[file.name] = _object(file)
    state = _newest_state(path)
    if state is not None:
        source.log = _log(state, _object(state))
    source.completions = _completions(path / "completions")
    # `hf-rb recover` leaves the card with its result, in `model`.
    if card := next((file for file in (path / "README.md", path / "model" / "README.md") if file.is_file()), None):
        text = card.read_text(encoding="utf-8", errors="replace")
        source.card = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return source


def _newest_state(folder: Path) -> Path | None:
    """The run's own state, or that of its last checkpoint where the run has not ended."""
    if (folder / STATE).is_file():
        return folder / STATE
    numbered = {
        int(match[1]): path
        for path in folder.glob(f"checkpoint-*/{STATE}")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    }
    return numbered[max(numbered)] if numbered else None


def _log(path: Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    log = state.get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise ValueError(
            f"{path} has no list `log_history` as a trainer writes it: the file is damaged, or of something else."
        )
    return log


def _object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): was the run interrupted while it wrote? Remove or restore it."
        ) from None
    document = document if isinstance(document, dict) else {"entries": document}
    named = {key: public_name(value) for key in NAMES if isinstance(value := document.get(key), str)}
    return document | named


def _completions(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("completions_*.parquet"))
    if not files:
        return []
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    rows: list[dict[str, Any]] = []
    for file in reversed(files):
        try:
            rows = read_table(file).to_pylist() + rows
        except (ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{file} is not a Parquet file that can be read ({error}). Remove or restore it."
            ) from None
        if len(rows) >= ROWS:
            break
    return rows[-ROWS:]
