"""Mixin of all our trainers, for everything but their losses."""

from typing import Any

from hf_rb.ops.backbone import has_prompt_learning
from hf_rb.trainers.common.card import CardMixin
from hf_rb.trainers.common.checkpoints import CheckpointsMixin
from hf_rb.trainers.common.metrics import MetricsMixin
from hf_rb.trainers.common.parallelism import cuts_sequences
from hf_rb.trainers.common.routers import prepare_routers


__all__ = ["TrainerMixin"]


class TrainerMixin(CheckpointsMixin, MetricsMixin, CardMixin):
    """
    Comes before a TRL trainer among a class's bases. A mixture of experts gets the auxiliary loss of its
    configuration, and MPI routers their steps.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        prepare_routers(self)

    def _check_sequences(self, name: str) -> None:
        """
        Refuses what shifts labels or cuts sequences.

        Raises:
            ValueError: With the name of what does not support it.
        """
        if has_prompt_learning(self.model):
            raise ValueError(
                f"{name} does not support prompt-learning adapters, whose virtual tokens shift the labels. Use LoRA."
            )
        if cuts_sequences(self):
            raise ValueError(
                f"{name} does not support context or sequence parallelism, which cut sequences over processes. Set "
                "`cp_size: 1` and `sp_size: 1`."
            )
