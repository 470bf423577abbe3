"""Generation from a model's own distribution: of a checkpoint's generation configuration nothing acts but its
tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_rb.ops.backbone import without_peft


__all__ = ["generation_config", "own_distribution", "stop_tokens"]

# What a checkpoint says about its tokens and its cache. All other fields say how somebody else would like to sample.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache")


@contextmanager
def own_distribution(model: PreTrainedModel) -> Iterator[None]:
    """
    Context in which `generate` inherits nothing from the checkpoint but its special tokens.

    transformers fills every field that a call leaves open from `model.generation_config`: a repetition penalty of a
    chat model would act on all samples. The model gets another one for as long as the context lasts; what the call
    itself asks for still acts.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Unwrapped model.
    """
    model = without_peft(model)
    inherited = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(inherited, name, None) for name in _KEPT})
    try:
        yield
    finally:
        model.generation_config = inherited


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """
    Returns the ids that end a completion: the checkpoint's, in its order, and the tokenizer's. `None` if there are
    none.

    Chat models may end a turn with several tokens, base models with one that their configuration does not know.
    """
    own = model.generation_config.eos_token_id
    stops = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in stops if token is not None)) or None


def generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float = 1.0,
    samples: int = 1,
) -> GenerationConfig:
    """
    Returns what `generate` needs to draw from a model's distribution, inside [`own_distribution`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Limit of a completion in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits; 0 is greedy.
        samples (`int`, *optional*, defaults to `1`):
            Completions of each prompt.
    """
    # transformers keeps the 50 most probable tokens unless it is told otherwise, and warns of such fields beside
    # greedy decoding.
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_return_sequences=samples,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=pad,
        **sampling,
    )
