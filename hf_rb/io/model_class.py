"""Class of transformers that a model folder is for: the one that `architectures` in its config.json names."""

from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel


__all__ = ["check_causal", "model_class", "skeleton"]


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """
    Returns the class that a checkpoint was saved from.

    A class of transformers is found by its name. The causal language model that a plug-in has registered for the type
    of the config is found too, as are classes without a name: `architectures` may be missing, or be an old name such
    as `LLaMAForCausalLM`.

    Raises:
        ValueError: There is no such class. Models whose code comes with the checkpoint have none.
    """
    name = (config.architectures or [None])[0]
    found = getattr(transformers, str(name), None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    causal = causal[0] if isinstance(causal, tuple) else causal
    if causal is not None and (name is None or name.endswith(("ForCausalLM", "LMHeadModel"))):
        return causal
    says = "has no `architectures`" if name is None else f"says `architectures: [{name}]`"
    remedy = "Write the name of the class that saved the model into it"
    if getattr(config, "auto_map", None):
        remedy = (
            "The class is code of the checkpoint, which no verb runs: quantize it from Python with "
            "`trust_remote_code=True`"
        )
    raise ValueError(
        f"The config.json of this {config.model_type} model {says}, and transformers {transformers.__version__} has "
        f"no such class. {remedy}."
    )


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Returns the model of a config on the meta device, in the type that the config names or another one."""
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        return model_class(config)._from_config(config, **options)


def check_causal(config: PreTrainedConfig, what: str = "What is measured here") -> type[PreTrainedModel]:
    """
    Returns the class of a checkpoint that predicts the next token of a text from the text alone.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Config of the checkpoint.
        what (`str`):
            What needs such a model, as the beginning of a sentence.

    Raises:
        ValueError: The class has no head that generates, needs an encoder, or reads something else than text.
    """
    found = model_class(config)
    if found.can_generate() and not config.is_encoder_decoder and found.main_input_name == "input_ids":
        return found
    why = "is an encoder-decoder" if config.is_encoder_decoder else "generates no text"
    if found.main_input_name != "input_ids":
        why = f"reads `{found.main_input_name}`"
    raise ValueError(
        f"{what} needs a causal language model, and {found.__name__} {why}. Give another model, or leave that out."
    )
