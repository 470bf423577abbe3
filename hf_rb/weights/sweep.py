"""The folder of a sweep: one model for each lambda."""

import json
from pathlib import Path


__all__ = ["REPORT", "read_sweep", "sweep_folder"]

REPORT = "merge.json"


def sweep_folder(folder: Path, lam: float) -> Path:
    """Returns the folder of the model of one lambda in the folder of a sweep."""
    return folder / f"lambda-{lam:g}"


def read_sweep(folder: str | Path) -> dict[float, Path] | None:
    """Returns the folders of a sweep's models by lambda, ascending; `None` if the folder holds no sweep.

    Raises:
        FileNotFoundError: One of its models is missing.
    """
    folder = Path(folder)
    if not (folder / REPORT).is_file() or (folder / "config.json").is_file():
        return None
    lams = json.loads((folder / REPORT).read_text(encoding="utf-8"))["options"].get("lambda")
    if not isinstance(lams, list):
        return None
    folders = {lam: sweep_folder(folder, lam) for lam in sorted(lams)}
    if missing := [model.name for model in folders.values() if not (model / "config.json").is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} of its sweep. Merge again.")
    return folders
