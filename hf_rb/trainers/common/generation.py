"""Parts that trainers share which let TRL generate."""

from collections.abc import Callable, Iterable
from typing import Any

from hf_rb.ops.generation import own_distribution
from hf_rb.trainers.common.below import TrainerBelow


__all__ = ["OwnDistributionMixin", "SamplerLogProbs"]


class OwnDistributionMixin(TrainerBelow):
    """
    Comes before a TRL trainer that generates: completions are drawn from the model's distribution, as the trainer's
    config and its `generation_kwargs` ask, and of the checkpoint's generation configuration its tokens alone act.
    """

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        with own_distribution(model):
            return super()._generate_single_turn(*args, **kwargs)


class SamplerLogProbs:
    """
    Keeps the log-probabilities with which vLLM has sampled, which the parent does not ask for.

    Args:
        generation (`VLLMGeneration`):
            TRL's handle of vLLM.
    """

    def __init__(self, generation: Any):
        self._turns: list[tuple[list[int], list[int], list[float]]] = []
        generation.logprobs = 0  # of the sampled token alone
        generation.generate = self._keeping(generation.generate)

    def _keeping(self, generate: Callable) -> Callable:
        def keeping(prompts: list[list[int]], **kwargs: Any) -> Any:
            result = generate(prompts=prompts, **kwargs)
            _, completions, log_probs, _ = result
            if log_probs is None:
                raise ValueError(
                    "`gopd_tis_cap` needs the log-probabilities of the sampler, and vLLM has reported none. Remove "
                    "`gopd_tis_cap`, or use a vLLM server of `trl vllm-serve`, which reports them."
                )
            # vLLM's NaN comes as None.
            values = [[float("nan") if top[0] is None else top[0] for top in row] for row in log_probs]
            self._turns += zip(prompts, completions, values, strict=True)
            return result

        return keeping

    def collect(self, rows: Iterable[tuple[list[int], list[int]]]) -> list[list[float]]:
        """
        Returns the log-probabilities of the tokens of whole completions, given with their prompts.

        A completion with tool calls has several turns, each sampled after everything before it, and cut where it was
        too long; what the tools have said was not sampled and gets NaN.
        """
        result = []
        for prompt, completion in rows:
            whole, values = prompt + completion, [float("nan")] * len(completion)
            for context, sampled, log_probs in self._turns:
                start, end = len(context), min(len(context) + len(sampled), len(whole))
                if (
                    len(prompt) <= start < end
                    and whole[:start] == context
                    and whole[start:end] == sampled[: end - start]
                ):
                    values[start - len(prompt) : end - len(prompt)] = log_probs[: end - start]
            result.append(values)
        self._turns.clear()
        return result
