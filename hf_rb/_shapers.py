"""Names of advantage shapers. Standard library only: `hf-rb check` reads them without torch."""

from importlib.metadata import EntryPoint, entry_points


__all__ = ["BUILT_IN", "GROUP", "registered_shapers"]

GROUP = "hf_rb.shapers"
"""Entry-point group in which another package registers `name = "module:Class"`."""

BUILT_IN = {
    "edas": "hf_rb.advantages.edas:EdasShaper",
    "calibadv": "hf_rb.advantages.calibadv:CalibAdvShaper",
    "srar": "hf_rb.advantages.srar:SrarShaper",
}


def registered_shapers() -> dict[str, EntryPoint]:
    """
    Returns what a name in `advantage_shapers` may stand for: the built-in shapers and those of installed packages.

    Returns:
        `dict[str, EntryPoint]`: By name; `load()` imports the class.

    Raises:
        ValueError: Two packages, or a package and this one, give the same name. A recipe must mean one thing.
    """
    found = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        if entry.name in found and found[entry.name].value != entry.value:
            owner = "a built-in of hf_rb" if entry.name in BUILT_IN else f"also {found[entry.name].value!r}"
            raise ValueError(
                f"The advantage shaper {entry.name!r} of {entry.value!r} (entry-point group {GROUP!r}) is {owner}. Rename it in "
                "the package that registers it, or uninstall that package."
            )
        found[entry.name] = entry
    return found
