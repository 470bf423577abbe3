"""The calibration sets that GPTQ users know by name, as optimum draws them."""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_rb.utils.random_state import random_states_kept


__all__ = ["NAMED_SETS", "named_set"]

# Of `optimum.gptq.data.get_dataset`, and of `GPTQConfig(dataset=...)`.
NAMED_SETS = ("wikitext2", "c4", "c4-new")


def named_set(
    name: str, tokenizer: PreTrainedTokenizerBase, head: list[int], num_samples: int, seqlen: int, seed: int
) -> Tensor:
    """
    Draws sequences of a named set by optimum's own function.

    Args:
        name (`str`):
            One of `NAMED_SETS`.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer of the model.
        head (`list[int]`):
            Ids that every sequence begins with. optimum's own sequences begin with none.
        num_samples, seqlen, seed (`int`):
            Sequences, their tokens with `head`, and the seed. Python's, NumPy's and torch's random states stay as they
            are.

    Returns:
        `torch.Tensor`: Token ids `(num_samples, seqlen)`, int64.

    Raises:
        ValueError: The texts are not on this machine and cannot be loaded.
    """
    from datasets.exceptions import DatasetsError  # datasets takes a while to import

    try:
        from optimum.gptq.data import get_dataset

        plain = partial(tokenizer, add_special_tokens=False, verbose=False)
        with random_states_kept(range(torch.cuda.device_count())):
            drawn = get_dataset(name, plain, nsamples=num_samples, seqlen=seqlen - len(head), seed=seed)
    except (ImportError, OSError, DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"`dataset={name!r}` is loaded by optimum from the Hub, which failed ({reason}): give `dataset` a text "
            "file, a JSON-lines file with the column `text` or a list of texts instead."
        ) from error
    front = torch.tensor([head] * num_samples, dtype=torch.int64).view(num_samples, len(head))
    return torch.cat([front, torch.cat([one["input_ids"] for one in drawn])], dim=1)
