"""Packages of other people, installed for one test: a module and its entry points."""

import importlib
import sys

from hf_rb.methods import registry, static


def install(monkeypatch, folder, package, code, **groups):
    """Installs a package of one module. `groups` are its entry points by kind, such as `shaper={"halve": "Halve"}`."""
    module = package.replace("-", "_")
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = []
    for kind, points in groups.items():
        lines += [f"[{registry.GROUPS[kind]}]", *(f"{name} = {module}:{target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)
    forget(monkeypatch)
    return module


def forget(monkeypatch):
    """Lets the registry look again, now and after the test."""
    importlib.invalidate_caches()
    for name in ("_installed", "_entry_points"):
        fresh = getattr(registry, name).__wrapped__
        monkeypatch.setattr(registry, name, registry.cache(fresh))
    for name in ("evaluate", "_read", "parsed"):
        monkeypatch.setattr(static, name, static.cache(getattr(static, name).__wrapped__))
