"""GKD's prompts and completions: the layouts of data that it takes beside SFT's, and the prompts of a collated
batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset


__all__ = ["in_layout_of_sft", "prompts_of"]


def in_layout_of_sft(dataset: Dataset | IterableDataset, args: Any, name: str) -> tuple[Any, bool]:
    """
    Returns a dataset with `prompt` and `completion` where SFT would label other tokens than GKD trains on, and whether
    it has prompts alone.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Data that is not tokenized.
        args ([`GKDConfig`]):
            The config.
        name (`str`):
            Name of the dataset in messages.

    Raises:
        ValueError: Prompts alone, where `args.lmbda` asks for the completions of the dataset; an example without
            anything to train on.
    """
    example: Any = next(iter(dataset))
    has_prompt, has_messages = "prompt" in example, "messages" in example or "conversations" in example
    if has_prompt and "completion" not in example and not has_messages:
        if args.lmbda < 1:
            raise ValueError(
                f"The {name} dataset has prompts without completions, and `lmbda: {args.lmbda}` trains on the "
                "completions of the dataset. Add a column `completion`, or set `lmbda: 1.0`."
            )
        return dataset.map(_with_empty_completion), True
    if has_prompt and isinstance(example.get("completion"), list):
        return dataset.map(_require_completion), False
    if has_messages and not args.assistant_only_loss and args.completion_only_loss is not False:
        # `conversations` with `from` and `value` too.
        columns = [column for column in ("messages", "conversations") if column in example]
        return dataset.map(_last_turn_as_completion, remove_columns=columns), False
    return dataset, False


def _with_empty_completion(example: dict[str, Any]) -> dict[str, Any]:
    """Returns the completion of an example that has a prompt alone."""
    if isinstance(example["prompt"], str):
        return {"completion": ""}
    _require_prompt(example["prompt"], "")
    return {"completion": [{"role": "assistant", "content": ""}]}


def _require_completion(example: dict[str, Any]) -> dict[str, Any]:
    """
    Changes nothing.

    Raises:
        ValueError: There is nothing to train on, or no turn before it.
    """
    if not example["completion"]:
        raise ValueError(
            "An example has a prompt and an empty `completion`, in which there is nothing to train on. Remove it, or "
            "set `lmbda: 1.0` and drop the column `completion`, so that the student writes all of them."
        )
    _require_prompt(example["prompt"], example["completion"][0].get("content"))
    return {}


def _last_turn_as_completion(example: dict[str, Any]) -> dict[str, Any]:
    """
    Returns prompt and completion of a conversation in `messages` or `conversations`.

    Raises:
        ValueError: The last turn is not the assistant's, or the only one.
    """
    messages = trl.maybe_convert_to_chatml(dict(example))["messages"]
    if not messages or messages[-1]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "missing"
        raise ValueError(
            f"The last turn of every conversation is trained on and must be the assistant's; one is {last}. Remove "
            "that example, or set `assistant_only_loss: true` to train on every assistant turn."
        )
    _require_prompt(messages[:-1], messages[-1].get("content"))
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _require_prompt(prompt: list[dict[str, Any]] | str, completion: Any) -> None:
    if not isinstance(prompt, str) and not prompt:
        raise ValueError(
            f"A conversation has no turn before the assistant's {str(completion or '')[:60]!r}, and without a prompt "
            "there is nothing that it completes. Put a user's turn before it, or remove that example."
        )


def prompts_of(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """
    Returns the prompt of each row of a padded batch: what comes before its last run of labels, or all of it without
    any.

    Raises:
        ValueError: A row has no prompt.
    """
    prompts = []
    for ids, labels, is_token in zip(
        inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool(), strict=True
    ):
        ids, is_label = ids[is_token], labels[is_token] != -100
        starts = is_label & ~torch.cat([is_label.new_zeros(1), is_label[:-1]])
        end = int(starts.nonzero()[-1]) if starts.any() else len(ids)
        if end == 0:
            raise ValueError(
                "An example has no prompt to sample a completion of: all its tokens are labels, as in plain text. "
                "Give prompts with `prompt` or `messages`, or set `lmbda: 0.0` without `seq_kd`."
            )
        prompts.append(ids[:end])
    return prompts
