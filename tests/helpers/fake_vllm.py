"""A stand-in for vLLM, which needs a GPU: TRL's handle of it, with given completions."""

import torch
import trl.trainer.distillation_trainer as trls


__all__ = ["fake_vllm", "log_probs"]


def log_probs(model, prompt, completion):
    """Log-probabilities of the tokens of a completion."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion]


def fake_vllm(patch, complete, is_unknown=lambda index, prompt: index == 0, shift=0.5):
    """
    Lets TRL's distillation trainers take completions from a function of the prompt. The log-probabilities that are reported are below the
    model's by `shift`, and NaN for the first token of a completion of which `is_unknown(index, prompt)`.
    """

    class FakeVLLM:
        def __init__(self, model, processing_class, logprobs, **kwargs):
            self.model, self.logprobs = model, logprobs

        def sync_weights(self):
            pass

        @torch.no_grad()
        def generate(self, prompts, images, num_generations, profiler):
            completions = [complete(prompt) for prompt in prompts]
            values = [
                [[value - shift] for value in log_probs(self.model, prompt, completion).tolist()]
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            for index, prompt in enumerate(prompts):
                if is_unknown(index, prompt):
                    values[index][0] = [None]  # NaN
            return prompts, completions, values if self.logprobs == 0 else None, None

    patch.setattr(trls, "is_vllm_available", lambda: True)
    patch.setattr(trls, "VLLMGeneration", FakeVLLM)
