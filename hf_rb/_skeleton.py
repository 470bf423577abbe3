"""What transformers makes of the tensors of a checkpoint: its own loader, run on tensors without values, before they are published."""

from collections.abc import Mapping
from typing import Any

import torch

from hf_rb._safetensors import Entry


__all__ = ["loading_problem", "model_class_of"]


def loading_problem(config: dict[str, Any], entries: Mapping[str, Entry], extra: bool = False) -> str | None:
    """
    Returns why transformers would not load these tensors as the model of this configuration with every parameter from a tensor.

    Args:
        config (`dict`):
            Contents of a `config.json`.
        entries (`dict[str, Entry]`):
            The tensors, of which names, types and shapes count.
        extra (`bool`, *optional*, defaults to `False`):
            Whether a tensor for which the model has no place is a problem too.
    """
    from transformers.utils import logging

    state = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # the loader's report and bar are for a model that is loaded
    logging.disable_progress_bar()
    try:
        model_class, built = model_class_of(config)
        _, info = model_class.from_pretrained(
            None, config=built, state_dict=state, device_map="meta", output_loading_info=True
        )
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        return f"transformers does not load it ({repr(error).splitlines()[0]})"
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    name = model_class.__name__
    if missing := sorted(info["missing_keys"]):
        return f"it has no {', '.join(missing[:3])}, which {name} needs"
    if extra and (homeless := sorted(info["unexpected_keys"])):
        return f"{name} has no place for {', '.join(homeless[:3])}"
    return None


def model_class_of(config: dict[str, Any]) -> tuple[type, Any]:
    """Returns the class that `architectures` names, and the configuration as an object."""
    import transformers

    values = {key: value for key, value in config.items() if key != "transformers_weights"}
    built = transformers.AutoConfig.for_model(**values)
    model_class = getattr(transformers, (config.get("architectures") or [""])[0], None)
    return model_class or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(built)], built
