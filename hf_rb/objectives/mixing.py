"""The mixture of a divergence with cross-entropy on the labels, `(1 - kd_alpha) · CE + kd_alpha · divergence`.

With `objective: forward_kl` and LoRA it is LLM-Neo (https://huggingface.co/papers/2411.06839).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_rb.methods import Method, Paper, flag
from hf_rb.methods.registry import methods


__all__ = ["MixtureFlags", "label_rules"]


@dataclass
class MixtureFlags:
    """Flags of the mixture."""

    kd_alpha: float = flag(
        1.0,
        "The loss is `(1 - kd_alpha) · cross-entropy + kd_alpha · divergence`. Below 1 it needs `lmbda=0`. LLM-Neo"
        ' (https://huggingface.co/papers/2411.06839) is `objective="forward_kl"` with this and LoRA.',
        range="[0, 1]",
    )


def label_rules(config: Any, name: str) -> Iterator[str]:
    """Yields what keeps a field from acting that changes a divergence by the labels of the dataset."""
    value = getattr(config, name)
    if config.lmbda > 0:
        yield (
            f"`{name}: {value}` needs `lmbda: 0.0`: it reads the labels of the dataset, which sampled completions do "
            f"not have; got `lmbda: {config.lmbda}`."
        )
    mixed = [key for key, entry in methods("objective").items() if entry.method.mixes]
    if config.objective not in mixed:
        yield (
            f"`{name}: {value}` acts on a divergence from the teacher, and `objective: {config.objective}` is none. "
            f"Choose one of {', '.join(mixed)}, or remove `{name}`."
        )


def _rules(config: Any) -> Iterator[str]:
    if config.kd_alpha != 1:
        yield from label_rules(config, "kd_alpha")


METHOD = Method(
    key="llm_neo",
    name="LLM-Neo",
    paper=Paper(
        "2411.06839",
        "LLM-Neo: Parameter Efficient Knowledge Distillation for Large Language Models",
        "Runming Yang, Taiqiang Wu, Jiahao Wang, Pengfei Hu, Yik-Chung Wu, Ngai Wong, Yujiu Yang",
    ),
    summary="Distillation into LoRA: the mean of cross-entropy and forward KL from a larger teacher, with only the "
    "adapters trained.",
    flags=MixtureFlags,
    rules=_rules,
)
