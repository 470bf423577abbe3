"""Calibration text as sequences of tokens."""

import hashlib
import os
import random
from textwrap import shorten
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_rb import tiny
from hf_rb.io.model_folder import find_model
from hf_rb.io.texts import read_texts
from hf_rb.quantizers.d2quant.calibrate.named_sets import NAMED_SETS, named_set
from hf_rb.quantizers.d2quant.config import D2QuantConfig
from hf_rb.quantizers.packed.report import Report
from hf_rb.utils.special_tokens import cut, special_tokens


__all__ = ["calibration_tokens", "load_texts", "load_tokenizer", "token_fingerprint"]

TEXTS_AT_A_TIME, TINY_ROWS = 64, 2000


def calibration_tokens(
    config: D2QuantConfig, tokenizer: PreTrainedTokenizerBase, report: Report | None = None
) -> Tensor:
    """
    Chooses sequences of calibration text.

    The texts are shuffled and joined, as many as are needed, and cut into sequences without a gap, of which some are
    drawn. A dataset with one long text is thus sampled as well as one with many short ones. Where the tokenizer puts a
    token before a text (BOS), every sequence begins with it. A set that has a name is drawn as optimum draws it.

    Args:
        config ([`D2QuantConfig`]):
            Says the `dataset`, `num_samples`, `seqlen` and `seed`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        report ([`~hf_rb.quantizers.Report`], *optional*):
            Is told what the sequences begin with.

    Returns:
        `torch.Tensor`: Token ids `(num_samples, seqlen)`, int64.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no text, or too little.
    """
    added = special_tokens(tokenizer)
    if report is not None:
        report.begins_with = added.name
    if config.seqlen <= len(added.head):
        raise ValueError(f"`seqlen={config.seqlen}` leaves no room for text: every sequence begins with {added.name}.")
    if is_named_set(config.dataset):
        return named_set(config.dataset, tokenizer, added.head, config.num_samples, config.seqlen, config.seed)
    texts = [text for text in load_texts(config, tokenizer) if text.strip()]
    if not texts:
        raise ValueError("The calibration text is empty: give `dataset` texts with something in them.")
    draws = random.Random(config.seed)
    draws.shuffle(texts)
    needed, ids = config.num_samples * config.seqlen, []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        part = texts[start : start + TEXTS_AT_A_TIME]
        for encoded in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += added.around(encoded)
        if len(ids) >= needed:
            break
    windows = list(cut(ids, added.head, config.seqlen))
    sequences = len(windows)
    if sequences < config.num_samples:
        length = len(ids) // config.num_samples
        fits = f"num_samples={sequences}" if sequences else f"seqlen={length}" if length > 1 else None
        raise ValueError(
            f"The calibration text has {len(ids):,} tokens; {config.num_samples} sequences of {config.seqlen} need "
            f"{needed:,}. Give more text{f', or write `{fits}`' if fits else ''}."
        )
    chosen = draws.sample(range(sequences), config.num_samples)
    return torch.tensor([windows[one] for one in chosen])


def is_named_set(dataset: Any) -> TypeGuard[str]:
    """Returns whether optimum knows a dataset by its name; a file that is called so comes first."""
    return isinstance(dataset, str) and dataset in NAMED_SETS and not os.path.exists(dataset)


def load_texts(config: D2QuantConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the texts that `config.dataset` names or is; those of `"tiny:math"` as the chat template has them."""
    data = config.dataset
    if not isinstance(data, str):
        return list(cast(list[str], data))  # calibration needs one
    if data.startswith("tiny:"):
        rows: Any = tiny.load_dataset(data.removeprefix("tiny:"), config="messages", split="train", size=TINY_ROWS)
        return [cast(str, tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in rows]
    if not os.path.exists(data):  # `Path.exists` refuses names that are too long
        if ", sha256 " in data:
            raise ValueError(f"`dataset={data!r}` is the fingerprint of a list. Give the texts themselves.")
        if any(map(str.isspace, data)):
            raise ValueError(
                f"`dataset={shorten(data, 40)!r}` is no file and no name of a dataset. A text itself goes into a "
                "list: `dataset=[text]`."
            )
    return read_texts(data, split="train")


def load_tokenizer(config: D2QuantConfig, model: Any) -> PreTrainedTokenizerBase:
    """
    Returns the tokenizer that a config gives or names, or else that of the model.

    Raises:
        ValueError: The model's folder has none.
    """
    given = config.tokenizer or model.name_or_path
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(find_model(str(given)))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"There is no tokenizer in {given or 'a model without a name'}, and calibration text needs one: give "
            "`tokenizer=...`, an object or a folder."
        ) from error
    return tokenizer


def token_fingerprint(tokens: Tensor) -> str:
    """Returns a SHA-256 of the shape and the ids."""
    return hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.numpy().tobytes()).hexdigest()
