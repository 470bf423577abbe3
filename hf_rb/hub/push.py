"""Uploads a model folder: what a model repository holds, and nothing else that lies there."""

from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_rb._files import MANIFEST, verify_manifest
from hf_rb._model_folder import ADAPTER_CONFIG, COMPANIONS
from hf_rb._weight_files import published_names


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["Upload", "check_repo_id", "plan_upload", "push_folder"]

# Configuration, tokenizer, card, code and measurements, beside the weights that somebody can load. Optimizer state, random states,
# pickles, caches, checkpoints, old shards and hidden files match nothing here.
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
    *COMPANIONS,
)
# Of the subfolder of a recovered model.
ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors", "base.json")


@dataclass(frozen=True)
class Upload:
    """What would be uploaded.

    Attributes:
        files (`dict[str, int]`): Names and sizes in bytes, by name.
        left_out (`list[str]`): What else lies in the folder; folders end in `/`.
    """

    files: dict[str, int]
    left_out: list[str]

    @property
    def size(self) -> int:
        return sum(self.files.values())


def plan_upload(folder: str | Path) -> Upload:
    """Says what of a model folder is uploaded.

    Args:
        folder (`str` or `Path`):
            Folder of a model or an adapter.

    Raises:
        FileNotFoundError: There is no such folder, or a weight file is missing.
        ValueError: No model, an incomplete one, or a file that is a link to somewhere else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    entries = sorted(folder.iterdir())
    weights = published_names(folder) if (folder / "config.json").is_file() else set()
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
    if not names & {"config.json", ADAPTER_CONFIG}:
        inside = f" {folder / 'model'} is one." if (folder / "model" / "config.json").is_file() else ""
        raise ValueError(f"{folder} holds no model: it has neither config.json nor {ADAPTER_CONFIG}.{inside}")
    if "config.json" not in names and "adapter_model.safetensors" not in names:
        raise FileNotFoundError(f"{folder} has an {ADAPTER_CONFIG} and no adapter_model.safetensors.")
    if (folder / MANIFEST).is_file() and (problems := verify_manifest(folder)):
        raise ValueError(f"{folder} is not what was saved: {problems[0]}.")
    left_out = [entry.name + "/" * entry.is_dir() for entry in entries if entry not in chosen]
    return Upload({file.relative_to(folder).as_posix(): file.stat().st_size for file in chosen}, left_out)


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
    **kwargs: Any,
) -> "CommitInfo":
    """Uploads a model folder in one commit.

    Args:
        folder (`str` or `Path`):
            Folder of a model or an adapter. Only what [`plan_upload`] lists leaves it.
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
        **kwargs:
            More of `HfApi.upload_folder`, such as `run_as_future=True`.

    Raises:
        FileNotFoundError, ValueError: As [`plan_upload`], or a name that no repository can have.
        OSError: The Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    check_repo_id(repo_id)
    upload, api = plan_upload(folder), HfApi(token=token)
    try:
        if create:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            allow_patterns=[escape(name) for name in upload.files],
            revision=revision,
            commit_message=commit_message or f"Upload {Path(folder).resolve().name}",
            **kwargs,
        )
    except HTTPError as error:
        if isinstance(error, OSError):  # what the Hub has answered
            raise
        raise ConnectionError(f"The Hub at {api.endpoint} cannot be reached: {error}") from error
