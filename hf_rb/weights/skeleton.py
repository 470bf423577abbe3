"""What transformers would make of a checkpoint: its own loader, run on tensors without values.

A merge that has the tensors and the configuration of one of its models loads as that one does, and needs none of this: importing
transformers takes more time and memory than merging. The check is for the rest, and for a refusal that should name its reason.
"""

from collections.abc import Mapping
from typing import Any

import torch

from hf_rb._safetensors import Entry


__all__ = ["loading_problem", "parameters"]


def loading_problem(config: dict[str, Any], entries: Mapping[str, Entry]) -> str | None:
    """
    Returns why transformers would not load these tensors as the model of this configuration with every parameter from a tensor.

    Args:
        config (`dict`):
            Contents of a `config.json`.
        entries (`dict[str, Entry]`):
            The tensors, of which names, types and shapes count.
    """
    from transformers.utils import logging

    state = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the report of the loader is for a model that is loaded
    try:
        model_class, built = _model_class(config)
        _, info = model_class.from_pretrained(
            None, config=built, state_dict=state, device_map="meta", output_loading_info=True
        )
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        return f"transformers does not load it ({str(error).splitlines()[0]})"
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    return f"it has no {', '.join(missing[:3])}, which {model_class.__name__} needs" if missing else None


def parameters(config: dict[str, Any], entries: Mapping[str, Entry]) -> dict[str, str] | None:
    """Returns a tensor's name by each parameter that the tensors become, or nothing where transformers does not know the model."""
    from hf_rb.quantizers.streaming import ParameterNames

    try:
        model_class, built = _model_class(config)
        with torch.device("meta"):
            find = ParameterNames(model_class(built))
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError):
        return None
    return {parameter: name for name in sorted(entries) for parameter in find(name)[0]}


def _model_class(config: dict[str, Any]) -> tuple[type, Any]:
    """Returns the class that `architectures` names, and the configuration as an object."""
    import transformers

    values = {key: value for key, value in config.items() if key != "transformers_weights"}
    built = transformers.AutoConfig.for_model(**values)
    model_class = getattr(transformers, (config.get("architectures") or [""])[0], None)
    return model_class or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(built)], built
