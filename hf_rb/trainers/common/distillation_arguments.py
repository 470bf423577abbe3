"""The fields that several configs share: their only definition, mixed into `SFTConfig`, `GKDConfig` and
`DistillationConfig`.
"""

from dataclasses import dataclass

from hf_rb.utils.fields import flag


__all__ = ["ObjectiveArguments", "PackingArguments"]


@dataclass
class PackingArguments:
    """Treatment of a model that mixes packed sequences."""

    allow_leaking_packing: bool = flag(
        False,
        "Whether to train a model that lets the sequences of a packed row see each other, as TRL does. By default the "
        "first packed batch of a run is compared with one of its sequences alone, and such a model is refused. Acts "
        "with `packing`, `padding_free` or a collator that packs.",
    )


@dataclass
class ObjectiveArguments:
    """Objective of the student."""

    objective: str = flag(
        "jsd",
        "What the student minimises; `hf-rb methods` lists the objectives. `jsd` is TRL's generalized Jensen-Shannon "
        "divergence with its `beta`.",
    )
