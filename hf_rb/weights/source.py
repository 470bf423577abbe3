"""A model folder that is merged: its tensors by the names that another checkpoint of the same model may use."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hf_rb.io.model_folder import check_plain, find_model
from hf_rb.io.safetensors import Checkpoint, Entry


__all__ = [
    "EMBEDDINGS",
    "HEADS",
    "TIE",
    "Source",
    "content",
    "holds_own_head",
    "says_tied",
    "some",
    "vocabulary_problem",
    "with_ties_of",
]

# Names of an embedding and of the head that may be tied to it.
EMBEDDINGS, HEADS = ("embed_tokens.weight", "wte.weight", "embed_in.weight"), ("lm_head.weight", "embed_out.weight")
TIE = "tie_word_embeddings"


class Source:
    """
    A model folder that is read.

    Args:
        role (`str`):
            What the model is in this operation, as the user wrote it: `"start"`, `"base"`, …
        name (`str` or `Path`):
            Embedded model, folder or Hub id.

    Raises:
        FileNotFoundError: There is no such model, or a weight file is missing.
        ValueError: It is quantized, an adapter lies beside it, or its files do not hold what their index says.
    """

    def __init__(self, role: str, name: str | Path):
        self.role, self.name, self.folder = role, str(name), find_model(str(name))
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if stored := self.config.get("quantization_config"):
            method = stored.get("quant_method", "something")
            raise ValueError(
                f"{role} ({name}) is quantized with {method}: its weights cannot be added to others. Give the model "
                "it was made from, write an ordinary one first (`hf-rb dequantize` for hf_rb's), or use adapters "
                "alone."
            )
        check_plain(self.folder)
        checkpoint = Checkpoint(self.folder)
        if checkpoint.lost:
            raise ValueError(
                f"{role} ({name}): the index lists {some(checkpoint.lost)}, which no file holds. Download it again."
            )
        self.files, self.shards, self.entries = checkpoint.files, checkpoint.shards, checkpoint.entries

    @cached_property
    def tied(self) -> bool:
        """Returns whether the configuration says that the head is the embedding."""
        if (said := says_tied(self.config)) is not None:
            return said
        from transformers import AutoConfig  # knows what the architecture does where its configuration does not say

        try:
            return bool(getattr(AutoConfig.from_pretrained(self.folder), TIE, False))
        except (ValueError, KeyError, OSError):
            return False

    def name_of(self, name: str) -> str | None:
        """
        Returns what these files call a tensor of another checkpoint: the same; with or without the prefix of a model
        with a head; or, where embedding and head are tied and the files hold one of them, the other.
        """
        names = name, name.removeprefix("model."), f"model.{name}"
        if found := next((name for name in names if name in self.entries), None):
            return found
        for ours, theirs in ((EMBEDDINGS, HEADS), (HEADS, EMBEDDINGS)):
            if name.endswith(ours) and self.tied:
                tied = [other for other in self.entries if other.endswith(theirs)]
                return tied[0] if len(tied) == 1 else None
        return None

    def find(self, name: str) -> Entry | None:
        """Returns the tensor that another checkpoint calls `name`."""
        known = self.name_of(name)
        return None if known is None else self.entries[known]

    def own_head(self, name: str, embedding: str) -> bool:
        """Returns whether the head is another matrix than the embedding; two tensors of the same values are one."""
        ours, theirs = self.find(name), self.find(embedding)
        return not (ours and theirs and (ours is theirs or same_values(ours, theirs)))

    def untie(self, name: str) -> None:
        """Gives a tied model a tensor for its head beside the one for its embedding; they have the same values."""
        entry = self.find(name)
        if entry is None:
            return
        for shard in self.shards:
            if entry in shard.values():
                shard[name] = entry
        self.entries[name] = entry

    def vocabulary(self) -> dict[int, str] | None:
        """The tokens by their ids, if there is a `tokenizer.json`."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            return None
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"].get("vocab", {})
        if isinstance(vocabulary, dict):
            tokens = {index: token for token, index in vocabulary.items()}
        else:  # Unigram: pairs of token and score
            tokens = {index: token for index, (token, _) in enumerate(vocabulary)}
        return tokens | {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}


def same_values(one: Entry, other: Entry) -> bool:
    """Returns whether two tensors are the same, type included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(torch.equal(*pair) for pair in zip(one.chunks(), other.chunks(), strict=True))


def holds_own_head(entries: dict[str, Entry]) -> bool:
    """Returns whether the tensors hold an embedding and a head of other values."""
    pair = [[entry for name, entry in entries.items() if name.endswith(names)] for names in (EMBEDDINGS, HEADS)]
    return all(len(found) == 1 for found in pair) and not same_values(pair[0][0], pair[1][0])


def says_tied(config: dict[str, Any]) -> bool | None:
    """Returns whether a configuration ties the head to the embedding, `None` if it leaves that to the architecture."""
    flags = [one[TIE] for one in (config, config.get("text_config") or {}) if TIE in one]
    return any(flags) if flags else None


def with_ties_of(config: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
    """Returns a configuration with what another one says about tying the head to the embedding; `None` says that it is
    not tied.
    """
    result = {key: value for key, value in config.items() if key != TIE}
    if other is None:
        result[TIE] = False
    elif TIE in other:
        result[TIE] = other[TIE]
    if isinstance(config.get("text_config"), dict):
        inner = None if other is None else other.get("text_config", {})
        result["text_config"] = with_ties_of(config["text_config"], inner)
    return result


def vocabulary_problem(one: Source, other: Source) -> str | None:
    """Returns which id stands for two tokens in two models, if any. A token that only one of them has is no
    problem.
    """
    files = [source.folder / "tokenizer.json" for source in (one, other)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return None
    ours, theirs = one.vocabulary() or {}, other.vocabulary() or {}
    conflict = next((index for index in sorted(ours.keys() & theirs.keys()) if ours[index] != theirs[index]), None)
    if conflict is None:
        return None
    return (
        f"{one.role} and {other.role} have different vocabularies: id {conflict} is {ours[conflict]!r} in one and "
        f"{theirs[conflict]!r} in the other"
    )


def content(file: Path) -> Any:
    """Returns the contents of a file, whatever its layout."""
    return json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else file.read_bytes()


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
