"""Base of our GKD trainer: TRL's without its set-up, or the two functions that it uses of TRL's where TRL has none."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch.nn.functional import kl_div
from transformers import GenerationConfig

from hf_rb.utils import compat


__all__ = ["GKDBase", "GKDFunctions"]


class GKDFunctions(trl.SFTTrainer):
    """TRL's SFT trainer with two functions of its experimental `GKDTrainer` (1.16), to the bit."""

    _tag_names = ["trl", "gkd"]
    _name = "GKD"
    _paper = {
        "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "id": "2306.13649",
    }

    @staticmethod
    def generalized_jsd_loss(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        beta: float,
        num_items_in_batch: torch.Tensor,
    ) -> torch.Tensor:
        """
        Generalized JSD, summed over all labels and divided by a number. See [`~hf_rb.objectives.jsd`], whose rounding
        is another.

        Args:
            student_logits, teacher_logits (`torch.Tensor` of shape `(B, L, V)`):
                Logits.
            labels (`torch.Tensor` of shape `(B, L)`):
                Tokens; -100 is left out.
            beta (`float`):
                0 is forward KL, 1 is reverse KL.
            num_items_in_batch (`torch.Tensor`):
                What the sum is divided by.
        """
        log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        if beta == 0:
            divergence = kl_div(log_q, log_p, reduction="none", log_target=True)
        elif beta == 1:
            divergence = kl_div(log_p, log_q, reduction="none", log_target=True)
        else:
            weight = torch.tensor(beta, dtype=log_q.dtype, device=log_q.device)
            log_m = torch.stack([log_q + torch.log1p(-weight), log_p + torch.log(weight)]).logsumexp(0)
            to_teacher, to_student = (kl_div(log_m, one, reduction="none", log_target=True) for one in (log_p, log_q))
            divergence = weight * to_teacher + (1 - weight) * to_student
        return divergence[labels != -100].sum() / num_items_in_batch.to(divergence.device)

    @staticmethod
    def generate_on_policy_outputs(
        model: Any, inputs: Mapping[str, torch.Tensor], generation_config: GenerationConfig
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Samples a completion of each prompt.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                Unwrapped model.
            inputs (`Mapping`):
                `prompts` and `prompt_attention_mask`, both (B, P), padded on the left.
            generation_config ([`~transformers.GenerationConfig`]):
                How to sample, and which tokens end a completion.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Prompts with completions (B, P + C); a mask of what is
            neither padding nor behind a completion's first end token; and the completions' labels.
        """
        prompts, prompt_mask = inputs["prompts"], inputs["prompt_attention_mask"]
        sequences = model.generate(
            input_ids=prompts,
            attention_mask=prompt_mask,
            generation_config=generation_config,
            return_dict_in_generate=True,
        ).sequences
        stops = generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        is_stop = torch.isin(sequences[:, prompts.shape[1] :], sequences.new_tensor(stops)).int()
        mask = torch.cat([prompt_mask, (is_stop.cumsum(-1) == is_stop).to(prompt_mask)], dim=1)
        labels = sequences.masked_fill(mask == 0, -100)
        labels[:, : prompts.shape[1]] = -100
        return sequences, mask, labels


if TYPE_CHECKING:
    _Parent = GKDFunctions
else:
    _Parent = GKDFunctions if compat.is_removed("GKDTrainer") else compat.GKDTrainer


class GKDBase(_Parent):
    """
    TRL's `GKDTrainer`, constructed and stepped as its parent.

    Its own constructor would replace the preparation of the data and attach a teacher of the student's exact width.
    Its own step samples after the labels are counted. `super()` reaches every other class among the bases of a
    subclass, but for one that is derived from TRL's `GKDTrainer` and stands behind ours: it is refused.

    Raises:
        TypeError: A class is defined whose `super()` would leave out one of its bases.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        left_out = order[order.index(GKDBase) + 1 : order.index(_Parent)]
        if left_out:
            name = left_out[0].__name__
            raise TypeError(
                f"`{name}`, a base of `{cls.__name__}`, derives from TRL's GKDTrainer, whose constructor and training "
                f"step ours leaves out, and with them those of `{name}`. Put `{name}` before hf_rb's GKDTrainer among "
                "the bases, or derive it from `trl.SFTTrainer`."
            )

    def __init__(self, *args: Any, **kwargs: Any):
        super(_Parent, self).__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super(_Parent, self).training_step(*args, **kwargs)
