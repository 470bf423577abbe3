"""Trial of a checkpoint before it is published: transformers' own loader, run on its tensors without their values."""

from collections.abc import Mapping
from typing import Any

import torch

from hf_rb.io.safetensors import Entry


__all__ = ["loading_problem", "skeleton_of"]


def loading_problem(config: dict[str, Any], entries: Mapping[str, Entry], extra: bool = False) -> str | None:
    """
    Returns why transformers would not load these tensors as the model of this configuration with every parameter from
    a tensor.

    Args:
        config (`dict`):
            Contents of a `config.json`.
        entries (`dict[str, Entry]`):
            The tensors, of which names, types and shapes count.
        extra (`bool`, *optional*, defaults to `False`):
            Whether a tensor for which the model has no place is a problem too.
    """
    from transformers.utils import logging

    from hf_rb.io.model_class import model_class

    state = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # the loader's report and bar are for a model that is loaded
    logging.disable_progress_bar()
    try:
        built = _built(config)
        kind = model_class(built)
        loaded: Any = kind.from_pretrained(
            None, config=built, state_dict=state, device_map="meta", output_loading_info=True
        )
        _, info = loaded
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        return f"transformers does not load it ({repr(error).splitlines()[0]})"
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    name = kind.__name__
    if missing := sorted(info["missing_keys"]):
        return f"it has no {', '.join(missing[:3])}, which {name} needs"
    if extra and (homeless := sorted(info["unexpected_keys"])):
        return f"{name} has no place for {', '.join(homeless[:3])}"
    return None


def skeleton_of(config: dict[str, Any]) -> Any:
    """Returns the model of the contents of a `config.json`, on the meta device."""
    from hf_rb.io.model_class import skeleton

    return skeleton(_built(config))


def _built(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**{key: value for key, value in config.items() if key != "transformers_weights"})
