"""Rules for the fields that several trainer configs share, each of which yields what is wrong with them. Standard
library only: `hf-rb check` runs these without torch.
"""

from collections.abc import Iterator
from typing import Any

from hf_rb.methods import Method
from hf_rb.methods.registry import methods, name_problem
from hf_rb.methods.rules import defaults_of, flag_rules


__all__ = ["objective_rules", "packing_rules", "trainer_methods", "trainer_rules"]


def packing_rules(config: Any) -> Iterator[str]:
    """Yields what makes packed sequences see each other in every model: rows of evaluation whose collator keeps no
    positions.
    """
    if config.eval_packing and not config.packing and config.packing_strategy != "wrapped":
        if not config.allow_leaking_packing:
            yield (
                "`eval_packing: true` without `packing: true`: TRL's collator then keeps no positions, and the "
                "packed sequences of the evaluation see each other in every model. Set `packing: true` too, or "
                "remove `eval_packing`."
            )


def objective_rules(config: Any, of_trl: str | None = None, **defaults: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of the objectives; `defaults` are those of TRL's fields that act on one,
    `of_trl` is the objective with which a trainer is TRL's.
    """
    if problem := name_problem("objective", config.objective, "objective"):
        yield problem
        return
    for name, entry in methods("objective").items():
        for field in entry.method.own if name != config.objective else ():
            if field in defaults and getattr(config, field) != defaults[field]:
                yield f"`{field}: {getattr(config, field)}` {_remedy(config, name, field)}"
    if getattr(config, "use_liger_kernel", False) and config.objective != of_trl:
        yield (
            "`use_liger_kernel: true` replaces the model's forward pass, and `objective: "
            f"{config.objective}` has a loss and a forward pass of its own. Remove `use_liger_kernel`."
        )
    yield from flag_rules(config, "objective", [config.objective], lambda name, field: _remedy(config, name, field))


def _remedy(config: Any, name: str, field: str) -> str:
    return (
        f"acts on `objective: {name}` only, and the objective is {config.objective!r}. Remove `{field}`, or set "
        f"`objective: {name}`."
    )


def trainer_methods(config: Any) -> Iterator[Method]:
    """Yields the methods that are no objective and no shaper, of which a config has the flags."""
    for entry in methods("trainer").values():
        if entry.method.flags and all(hasattr(config, name) for name in defaults_of(entry.method)):
            yield entry.method


def trainer_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the flags of [`trainer_methods`]."""
    for method in trainer_methods(config):
        yield from method.rules(config)
