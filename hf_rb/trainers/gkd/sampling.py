"""Completions that a model writes while GKD trains, in place of those of the dataset."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from hf_rb.ops.backbone import own_randomness
from hf_rb.ops.generation import own_distribution
from hf_rb.trainers.gkd.base import GKDBase
from hf_rb.trainers.gkd.data import prompts_of
from hf_rb.utils import compat


__all__ = ["SamplingGKD"]


class SamplingGKD(GKDBase):
    """
    Lets a model write the completions of a batch.

    Attributes:
        generation_config ([`~transformers.GenerationConfig`]): How, set by the class below.
    """

    generation_config: GenerationConfig

    def _with_completions(self, inputs: Mapping[str, Any], writer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Replaces the completions of a batch; nothing of its old completions is left."""
        prompts = prompts_of(inputs)
        completions = self._sample(writer, prompts)
        rows = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
        labels = [
            torch.cat([torch.full_like(prompt, -100), completion])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    def _sample(self, writer: torch.nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Samples a completion of each prompt; it ends with its first end-of-sequence token."""
        ids = pad_sequence(prompts, batch_first=True, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
        checkpointing: Any = self.args.gradient_checkpointing_kwargs  # a string only until the config has read it
        with (
            own_randomness([self.accelerator.device]),
            compat.unwrap_model_for_generation(
                writer,
                self.accelerator,
                gradient_checkpointing_kwargs=checkpointing,
            ) as model,
            own_distribution(model),  # pyrefly: ignore[bad-argument-type]  (TRL says Module)
        ):
            # From the step and the prompts, so that processes draw independently and a resumed run as the first one
            # did.
            key = (self.args.seed, self.state.global_step, [prompt.tolist() for prompt in prompts])
            torch.manual_seed(random.Random(repr(key)).getrandbits(63))
            inputs = {"prompts": ids, "prompt_attention_mask": mask}
            sequences, is_token, _ = self.generate_on_policy_outputs(model, inputs, self.generation_config)
        start = ids.shape[1]
        return [row[start:][kept[start:] == 1] for row, kept in zip(sequences, is_token, strict=True)]
