"""Special tokens that a tokenizer puts around a text, and windows of a text that begin as the model has learnt that
texts begin.

Models that were trained with a token at the beginning (BOS) attend to it all the time: without it they are far worse.
A window cut out of the middle of a text has none, so it gets one.
"""

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


__all__ = ["SpecialTokens", "begins_with", "cut", "special_tokens"]


class SpecialTokens(NamedTuple):
    """
    Ids that a tokenizer puts around every text.

    Attributes:
        head (`list[int]`): Before it, as BOS or CLS.
        tail (`list[int]`): Behind it, as EOS or SEP.
        name (`str`, *optional*): The tokens of `head` as text, such as `"<bos>"`.
    """

    head: list[int]
    tail: list[int]
    name: str | None

    def around(self, ids: list[int]) -> list[int]:
        """Returns the ids of a text with what belongs around them, once, also where the text has it already."""
        head = [] if begins_with(ids, self.head) else self.head
        tail = [] if ids[len(ids) - len(self.tail) :] == self.tail else self.tail
        return head + ids + tail


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """
    Asks a tokenizer what it puts around a text; its attributes (`bos_token`, `add_bos_token`) do not say that
    reliably.

    Raises:
        ValueError: The ids of a text are other ones with special tokens than without.
    """
    own, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    places = [start for start in range(len(whole) - len(own) + 1) if whole[start : start + len(own)] == own]
    if not places or (whole and not own):
        raise ValueError(
            f"{type(tokenizer).__name__} makes {own} of 'a' without special tokens and {whole} with them, so what it "
            "puts around a text cannot be told. Give the model a tokenizer that only adds tokens before and behind a "
            "text."
        )
    head, tail = whole[: places[0]], whole[places[0] + len(own) :]
    return SpecialTokens(head, tail, " ".join(tokenizer.convert_ids_to_tokens(head)) if head else None)


def begins_with(ids: list[int], head: list[int]) -> bool:
    return ids[: len(head)] == head


def cut(ids: list[int], head: list[int], length: int) -> Iterator[list[int]]:
    """
    Yields the whole windows of `length` ids of a text, without a gap. Each begins with `head`, once: it is put there
    unless the text has it at that place.

    Raises:
        ValueError: There is no room behind `head`.
    """
    if length <= len(head):
        raise ValueError(
            f"A sequence of {length} tokens has no room for more than the {len(head)} that it begins with."
        )
    start = 0
    while True:
        added = [] if begins_with(ids[start : start + len(head)], head) else head
        end = start + length - len(added)
        if end > len(ids):
            return
        yield added + ids[start:end]
        start = end
