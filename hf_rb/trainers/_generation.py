"""What trainers that let TRL generate share."""

from typing import Any

from hf_rb.ops.generation import own_distribution


__all__ = ["OwnDistributionMixin"]


class OwnDistributionMixin:
    """
    Comes before a TRL trainer that generates: completions are drawn from the model's distribution, as the trainer's config and its
    `generation_kwargs` ask, and of the checkpoint's generation configuration its tokens alone act.
    """

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with own_distribution(self.accelerator.unwrap_model(self.model)):
            return super()._generate_single_turn(*args, **kwargs)
