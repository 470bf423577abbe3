"""Steps of a solution: where they begin in its text, and which tokens they are."""

import functools
import re
from collections.abc import Callable, Sequence


__all__ = ["STEP_HEADER", "find_steps", "token_spans"]

STEP_HEADER = re.compile(r"^#{1,6}[ \t]*Step[ \t]+\d+", re.MULTILINE | re.IGNORECASE)
"""Where a step begins: a line such as `### Step 1:`."""


def find_steps(text: str, pattern: str | re.Pattern = STEP_HEADER) -> list[tuple[int, int]]:
    """
    Finds the steps of a completion: each from its `### Step N:` header to the next, numbered by order, whatever N is.

    Args:
        text (`str`):
            The completion.
        pattern (`str` or `re.Pattern`, *optional*):
            Matches where a step begins, in place of such headers.

    Returns:
        `list[tuple[int, int]]`: first character and character after the last. Without a header the whole text is one
        step.
    """
    starts = [match.start() for match in re.finditer(pattern, text)] or [0]
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def token_spans(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], spans: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """
    Turns characters of `decode(ids)` into tokens.

    Args:
        ids (`Sequence[int]` of length L):
            Tokens.
        decode (`Callable[[Sequence[int]], str]`):
            Their text. A prefix of the tokens must decode to a prefix of the text, but for a character that it cuts in
            two.
        spans (`Sequence[tuple[int, int]]`):
            First character and character after the last, in ascending order.

    Returns:
        `list[tuple[int, int]]`: first token and token after the last of each span. A token that holds characters of
        two spans belongs to the later one.
    """

    @functools.cache
    def characters(count: int) -> int:
        # A character that is cut in two decodes to replacement characters, sometimes to more than the whole one.
        return len(decode(ids[:count]).rstrip("\ufffd")) if count < len(ids) else len(decode(ids))

    @functools.cache
    def token_of(character: int, low: int) -> int:
        # The first token after which the text is longer than `character`. Decoding is what costs, and text grows
        # almost evenly with tokens: interpolation takes a few attempts where halving takes ten. Halving ends it when
        # the text is uneven.
        high, attempts = len(ids), 0
        while low < high:
            middle = (low + high) // 2
            if attempts < 8:
                before, after = characters(low), characters(high)
                middle = low + (high - low) * max(character - before, 0) // max(after - before, 1)
                middle = min(middle, high - 1)
            low, high = (low, middle) if characters(middle + 1) > character else (middle + 1, high)
            attempts += 1
        return low

    found, start = [], 0
    for first, last in spans:
        start = token_of(first, start)
        stop = token_of(last, start)
        found.append((start, stop))
    return found
