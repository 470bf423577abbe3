"""
Uploads what has a page: a model folder, with what a model repository holds and nothing else that lies there; a teacher
cache, as a dataset; a report, as a static Space.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2.utils import htmlsafe_json_dumps

from hf_rb.hub.card import Result
from hf_rb.hub.loading import read_json
from hf_rb.hub.pages import CACHE_FORMAT, cache_card, existing_card, model_card, paths_in, report_card
from hf_rb.hub.results import card_with_results
from hf_rb.io.files import MANIFEST, sha256_file, verify_manifest
from hf_rb.io.model_folder import ADAPTER_CONFIG, COMPANIONS
from hf_rb.io.weight_files import published_names


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["Upload", "check_repo_id", "plan_upload", "push_folder"]

# What is uploaded beside the weights: configuration, tokenizer, card, code and measurements. Optimizer state, random
# states, pickles, caches, checkpoints, old shards and hidden files match none of these patterns.
UPLOADED = (
    "README.md",
    "config.json",
    ADAPTER_CONFIG,
    "adapter_model*.safetensors",
    "modeling_*.py",
    "configuration_*.py",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "report.json",
    "report.html",
    "report.md",
    "*.gguf",
    *COMPANIONS,
)
# Of the subfolder of a recovered model.
ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors", "base.json")


# Files that are searched for paths of this machine, which would be published.
TEXTS = ("README.md", "config.json", ADAPTER_CONFIG, "*_results.json", "report.*", "index.html", MANIFEST)


@dataclass(frozen=True)
class Upload:
    """Files and card of an upload.

    Attributes:
        paths (`dict[str, Path]`): Where the files lie, by their names in the repository.
        card (`str`): Text of `README.md`.
        left_out (`list[str]`): What else lies in the folder; folders end in `/`.
        repo_type (`"model"`, `"dataset"` or `"space"`): What kind of repository it is for.
        notes (`list[str]`): What a visitor of the page would miss, a sentence each.
    """

    paths: dict[str, Path]
    card: str
    left_out: list[str] = field(default_factory=list)
    repo_type: Literal["model", "dataset", "space"] = "model"
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, int]:
        """Names and sizes in bytes."""
        sizes = {name: path.stat().st_size for name, path in self.paths.items()}
        return dict(sorted((sizes | {"README.md": len(self.card.encode())}).items()))

    @property
    def size(self) -> int:
        return sum(self.files.values())


def plan_upload(folder: str | Path, repo_id: str | None = None, results: Sequence[Result] = ()) -> Upload:
    """Says what is uploaded.

    A card is made where there is none, and in place of the empty one that PEFT writes; nothing is changed in the
    folder.

    Args:
        folder (`str` or `Path`):
            Folder of a model, an adapter, GGUF files or a teacher cache, or the HTML file of `hf-rb report`.
        repo_id (`str`, *optional*):
            Name that the card's own examples get in place of `path/to/NAME`, where NAME is what the card calls the
            model.
        results (`Sequence[Result]`, *optional*, defaults to `()`):
            Measurements that the card gets beside its own.

    Raises:
        FileNotFoundError: There is no such folder, or a weight file is missing.
        ValueError: No model, an incomplete one, a file that is a link to somewhere else, or results of what is no
            model.
    """
    folder = Path(folder)
    if folder.suffix == ".html" and folder.is_file():
        upload = Upload({"index.html": folder}, report_card(folder.stem), repo_type="space")
    elif not folder.is_dir():
        if folder.is_file():
            raise ValueError(
                f"{folder} is a file: give the folder that holds it. Of files only the .html of a report is uploaded "
                "alone."
            )
        raise FileNotFoundError(f"There is no folder {folder}.")
    elif read_json(folder / MANIFEST).get("format") == CACHE_FORMAT:
        upload = _plan_cache(folder)
    else:
        paths, left_out = _model_files(folder)
        card = card_with_results(folder / "README.md", results) if results else existing_card(folder)
        notes = [] if card else [f"{folder} has no card of its own: README.md is written from its files."]
        upload = Upload(paths, card or model_card(folder), left_out, notes=notes)
    if results and upload.repo_type != "model":
        raise ValueError(f"{folder} is no model, and `--results` are measurements of one: leave them out.")
    if repo_id:
        upload = replace(upload, card=_named(upload.card, repo_id))
    upload.notes.extend(_missing(upload))
    return upload


def _plan_cache(folder: Path) -> Upload:
    from hf_rb.teachers.cache_format import VOCABULARY, Manifest

    manifest = Manifest.read(folder)
    if not manifest.is_complete:
        raise ValueError(f"{folder} is an unfinished teacher cache: the same call of `hf-rb cache-teacher` goes on.")
    for shard in manifest.shards.values():
        path = folder / shard.file
        if not path.is_file() or sha256_file(path) != shard.sha256:
            raise ValueError(
                f"{path} is missing or not what was captured. Capture it again with `hf-rb cache-teacher`."
            )
    names = [MANIFEST, VOCABULARY, *(shard.file for shard in manifest.shards.values())]
    left_out = sorted(entry.name for entry in folder.iterdir() if entry.name not in [*names, "README.md"])
    return Upload(
        {name: folder / name for name in names}, existing_card(folder) or cache_card(folder), left_out, "dataset"
    )


def _named(card: str, repo_id: str) -> str:
    """Returns the card with the repository in its examples. Other paths are the user's, and stay."""
    head = ModelCard(card, ignore_metadata_errors=True).data
    name = head.get("model_name") or head.get("pretty_name")
    spelled = "|".join(re.escape(one) for one in {name, htmlsafe_json_dumps(name)[1:-1]}) if name else ""
    return re.sub(rf"(?<![\w/.])path/to/(?:{spelled})(?![\w/.-])", lambda _: repo_id, card) if name else card


def _missing(upload: Upload) -> Iterator[str]:
    """What a visitor of the page would miss, or should not see."""
    head = ModelCard(upload.card, ignore_metadata_errors=True).data.to_dict()
    wanted = {"model": ("license", "base_model"), "dataset": ("license",), "space": ()}[upload.repo_type]
    if names := [name for name in wanted if not head.get(name)]:
        lines = " and ".join(f"`{name}: …`" for name in names)
        yield (
            f"README.md names no {' and no '.join(name.replace('_', ' ') for name in names)}: add {lines} to its head."
        )
    config = read_json(upload.paths[ADAPTER_CONFIG]) if ADAPTER_CONFIG in upload.paths else {}
    base = config.get("base_model_name_or_path")
    if base and os.path.exists(base):
        yield (
            f"{ADAPTER_CONFIG} names a folder of this machine as `base_model_name_or_path`, from which nobody else "
            "can load the base: write the Hub id of the base model."
        )
    for name, path in upload.paths.items():
        if any(fnmatch(name, pattern) for pattern in TEXTS) and name != ADAPTER_CONFIG:
            yield from _published(name, path.read_text(encoding="utf-8", errors="replace"))
    yield from _published("README.md", upload.card)


def _published(name: str, text: str) -> Iterator[str]:
    if paths := paths_in(text):
        yield f"{name} names paths of this machine, {paths[0]} for one: remove them where that is nobody's business."


def _model_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Returns what of a model folder is uploaded, `README.md` apart, and the names of what else lies there."""
    entries = sorted(folder.iterdir())
    has_weights = any(entry.suffix in (".safetensors", ".bin") and entry.name not in ADAPTER for entry in entries)
    is_other = not has_weights and any(entry.suffix == ".gguf" or entry.name == ADAPTER_CONFIG for entry in entries)
    weights = published_names(folder) if (folder / "config.json").is_file() and not is_other else set()
    chosen = [
        entry
        for entry in entries
        if entry.is_file() and (entry.name in weights or any(fnmatch(entry.name, one) for one in UPLOADED))
    ]
    adapter = folder / "adapter"
    if (adapter / ADAPTER_CONFIG).is_file():
        chosen += [adapter / name for name in ADAPTER if (adapter / name).is_file()]
        entries.remove(adapter)
    for file in chosen:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{file} is a link to a file outside the folder. Copy the model to a folder of its own.")
    names = {file.relative_to(folder).as_posix() for file in chosen}
    if not names & {"config.json", ADAPTER_CONFIG} and not any(name.endswith(".gguf") for name in names):
        inside = f" {folder / 'model'} is one." if (folder / "model" / "config.json").is_file() else ""
        raise ValueError(f"{folder} holds no model: it has neither config.json nor {ADAPTER_CONFIG}.{inside}")
    if ADAPTER_CONFIG in names and not names & {"config.json", "adapter_model.safetensors"}:
        raise FileNotFoundError(f"{folder} has an {ADAPTER_CONFIG} and no adapter_model.safetensors.")
    if (folder / MANIFEST).is_file() and (problems := verify_manifest(folder)):
        raise ValueError(f"{folder} is not what was saved: {problems[0]}.")
    left_out = [entry.name + "/" * entry.is_dir() for entry in entries if entry not in chosen]
    paths = {file.relative_to(folder).as_posix(): file for file in chosen if file.name != "README.md"}
    return paths, left_out


def check_repo_id(repo_id: str) -> None:
    """Raises a `ValueError` for a name that no repository can have."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository, such as me/my-model: {error}") from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    create: bool = True,
    results: Sequence[Result] = (),
    **kwargs: Any,
) -> "CommitInfo":
    """Uploads a model, a teacher cache or a report in one commit.

    Args:
        folder (`str` or `Path`):
            Folder or file, as [`plan_upload`] takes it. Only what that lists is uploaded.
        repo_id (`str`):
            `name/model` on the Hub.
        private (`bool`, *optional*):
            Whether a repository that is made for it is private; by default, as the account or organization has it.
        revision (`str`, *optional*):
            Branch, `main` by default. It must exist.
        commit_message (`str`, *optional*):
            Defaults to `"Upload <folder's name>"`.
        token (`str`, *optional*):
            By default the one that `hf auth login` has stored, or `HF_TOKEN`.
        create (`bool`, *optional*, defaults to `True`):
            Whether to make the repository where it does not exist.
        results (`Sequence[Result]`, *optional*, defaults to `()`):
            Measurements for the card.
        **kwargs:
            More of `HfApi.create_commit`, such as `run_as_future=True`.

    Raises:
        FileNotFoundError, ValueError: As [`plan_upload`], or a name that no repository can have.
        OSError: The Hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    check_repo_id(repo_id)
    upload, api = plan_upload(folder, repo_id, results), HfApi(token=token)
    files = {name: str(path) for name, path in upload.paths.items()} | {"README.md": upload.card.encode()}
    kind: dict[str, Any] = {"repo_type": upload.repo_type}
    try:
        if create:
            space: dict[str, Any] = {"space_sdk": "static"} if upload.repo_type == "space" else {}
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True, **kind, **space).repo_id
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in sorted(files.items())],
            revision=revision,
            commit_message=commit_message or f"Upload {Path(folder).resolve().name}",
            **kind,
            **kwargs,
        )
    except HTTPError as error:
        if isinstance(error, OSError):  # what the Hub has answered
            raise
        raise ConnectionError(f"The Hub at {api.endpoint} cannot be reached: {error}") from error
