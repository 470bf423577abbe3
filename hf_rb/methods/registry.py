"""Names of advantage shapers. Standard library only: `hf-rb check` reads them without torch."""

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any


__all__ = ["BUILT_IN", "GROUP", "LOCAL", "pipeline_line", "registered_shapers"]

GROUP = "hf_rb.shapers"
"""Entry-point group in which another package registers `name = "module:Class"`."""

BUILT_IN = {
    "edas": "hf_rb.advantages.edas:EdasShaper",
    "calibadv": "hf_rb.advantages.calibadv:CalibAdvShaper",
    "srar": "hf_rb.advantages.srar:SrarShaper",
}

LOCAL: set[str] = set()
"""What the command line allowed to be imported, as `module:attribute`: its own name in `advantage_shapers`."""


def registered_shapers() -> dict[str, EntryPoint]:
    """
    Returns what a name in `advantage_shapers` may stand for: the built-in shapers and those of installed packages.

    Returns:
        `dict[str, EntryPoint]`: By name; `load()` imports the class.

    Raises:
        ValueError: Two packages, or a package and this one, give the same name. A recipe must mean one thing.
    """
    found = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    found |= {name: EntryPoint(name, name, GROUP) for name in sorted(LOCAL)}
    for entry in entry_points(group=GROUP):
        if entry.name in found and found[entry.name].value != entry.value:
            owner = "a built-in of hf_rb" if entry.name in BUILT_IN else f"also {found[entry.name].value!r}"
            raise ValueError(
                f"The advantage shaper {entry.name!r} of {entry.value!r} (entry-point group {GROUP!r}) is {owner}. "
                "Rename it in the package that registers it, or uninstall that package."
            )
        found[entry.name] = entry
    return found


def pipeline_line(config: Any, names: Iterable[str] | None = None) -> str:
    """
    Says in one line what happens to the advantages, for the start of a run and for `hf-rb check`.

    Args:
        config (`GRPOConfig`, or anything with its fields):
            The config.
        names (`Iterable[str]`, *optional*):
            Shapers that run in place of `config.advantage_shapers`, in order. What the config says is not theirs.
    """
    stages = [f"GRPO over groups of {config.num_generations}", *(names or ())]
    for name in config.advantage_shapers if names is None else ():
        own = {key.removeprefix(f"{name}_"): value for key, value in vars(config).items() if _shapes(key, name)}
        shown = ", ".join(f"{key} {value}" for key, value in own.items() if value is not None)
        stages.append(f"{name} ({shown})" if shown else name)
    stages.append(f"{config.loss_type} loss")
    if config.hidden_align_coef:
        stages[-1] += f" + {config.hidden_align_coef} hidden-align"
    return f"advantages: {' -> '.join(stages)}"


def _shapes(key: str, name: str) -> bool:
    """Whether a field says what a shaper does; how a judge is reached does not."""
    return key.startswith(f"{name}_") and (not key.startswith("srar_judge_") or key == "srar_judge_model")
