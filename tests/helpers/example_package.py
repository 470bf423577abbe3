"""The package in `tests/example_package`, which adds methods to hf_rb."""

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.plugins import forget
from hf_rb.integrations import registration


FOLDER = Path(__file__).parents[1] / "example_package"


@contextmanager
def installed(site: Path) -> Iterator[None]:
    """Writes into a folder what pip leaves of the package, and makes this process find both."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        for folder in (site, FOLDER):
            patch.syspath_prepend(str(folder))
        forget(patch)
        registration.register()
        yield
