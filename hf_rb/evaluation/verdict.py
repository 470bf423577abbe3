"""Meaning of a ratio of perplexities, in words. The thresholds are ours: there is no paper that draws such a line."""

import math
from dataclasses import dataclass
from typing import Any

from hf_rb.utils.output import finite


__all__ = ["CLOSE_BELOW", "DAMAGED_BELOW", "Verdict", "judge"]

CLOSE_BELOW, DAMAGED_BELOW = 1.1, 2.0
THRESHOLDS = f"our thresholds: below {CLOSE_BELOW:g} close, below {DAMAGED_BELOW:g} damaged, else broken"


@dataclass(frozen=True)
class Verdict:
    """
    Damage of a model, against the one that it was made from.

    Attributes:
        times (`float`): Its perplexity over the original's, on the same tokens. Infinite if its own is NaN, NaN if the
            original's is not finite.
        word (`str`): `"close"`, `"damaged"` or `"broken"`; `"unknown"` if the original's perplexity is not finite.
        original (`str`): What the original is, such as `"16 bits"`.
        rounded_times (`float`, *optional*): The same ratio for the original with its layers rounded to 4 bits.
    """

    times: float
    word: str
    original: str
    rounded_times: float | None = None

    def __str__(self) -> str:
        if math.isnan(self.times):
            return (
                f"Nothing can be said of this model: the perplexity of {self.original} is itself infinite or not a "
                "number."
            )
        said = (
            f"Perplexity is {_times(self.times)} times that of {self.original}: this model is {self.word} "
            f"({THRESHOLDS})."
        )
        return (
            said if self.rounded_times is None else f"{said} Plain 4-bit rounding: {_times(self.rounded_times)} times."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the verdict for JSON, with its sentence and the thresholds. JSON has no infinity and no NaN: they
        are `None`.
        """
        return finite(vars(self)) | {"sentence": str(self), "close_below": CLOSE_BELOW, "damaged_below": DAMAGED_BELOW}


def judge(perplexity: float, original_perplexity: float, original: str, rounded: float | None = None) -> Verdict:
    """
    Compares perplexities that were measured on the same tokens.

    Args:
        perplexity, original_perplexity (`float`):
            Of the model, and of the one that it was made from.
        original (`str`):
            What the latter is, as it follows "that of".
        rounded (`float`, *optional*):
            Perplexity of the original with the same layers rounded to 4 bits.
    """
    if not math.isfinite(original_perplexity):
        return Verdict(math.nan, "unknown", original)

    def ratio(value: float) -> float:
        return math.inf if math.isnan(value) else value / original_perplexity

    times, rounded_times = ratio(perplexity), None if rounded is None else ratio(rounded)
    word = "close" if times < CLOSE_BELOW else "damaged" if times < DAMAGED_BELOW else "broken"
    return Verdict(times, word, original, rounded_times)


def _times(ratio: float) -> str:
    digits = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"{ratio:,.{digits}f}"
