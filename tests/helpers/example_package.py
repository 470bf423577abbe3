"""The package in `tests/example_package`, which adds methods to hf_rb."""

import importlib
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path


FOLDER = Path(__file__).parents[1] / "example_package"


def forget_methods():
    """Looks for methods again."""
    from hf_rb.cli import schemas
    from hf_rb.integrations import registration
    from hf_rb.methods import registry

    importlib.invalidate_caches()
    registry._installed.cache_clear()
    schemas.load.cache_clear()
    registration.register()


@contextmanager
def installed(site: Path):
    """Makes what pip leaves of the package in a folder, and imports from it in this process."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
    paths = [str(site), str(FOLDER)]
    sys.path[:0] = paths
    forget_methods()
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)
        forget_methods()
