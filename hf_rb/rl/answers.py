r"""Equality of two answers: one notion for rewards, evaluation, EDAS's classes and judges.

[`same_answer`] decides, in this order:

1. Nothing equals no answer.
2. Equal texts are the same answer. Blanks around them, case, dollar signs around formulas, `\text{}` and a final point
   do not count.
3. Numbers are compared as numbers: `1,080` is `1080`, `$18` and `18.` are `18.00`. A comma separates thousands, so
   that `1,2` is not `12`. A currency may be left out but not changed, and so may a unit: `5 km` is `5` and not `5 m`.
4. Words are compared as text only, and so are dates, times such as `9:05`, versions and the like, which
   arithmetic would make numbers of. `12:30` may be a ratio and is one.
5. What is left is compared by `math-verify` where it is installed (`pip install 'hf_rb[math]'`): `\frac{1}{2}` is
   `0.5`, `\{1, 2\}` is `\{2, 1\}`, `50\%` is both `50` and `1/2`, decimals are equal to six places, of which five
   digits count. Where it is not installed, what is left is different.

Standard library only; `math-verify` runs in a process of its own.
"""

import re
from decimal import Decimal
from importlib.util import find_spec
from numbers import Number
from typing import Any, NamedTuple

from hf_rb.rl import math_process
from hf_rb.utils.optional import missing


__all__ = ["check_gold", "gold_answer", "is_readable", "math_equivalent", "require_math_verify", "same_answer"]

_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}")
_SPELLINGS = {r"\$": "$", r"\%": "%", "{,}": ",", r"\,": ",", r"\!": "", "−": "-"}
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?P<before>[$€£¥¢₹₩₽])\s*)?(?P<minus>-?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?P<fraction>(?:\.[0-9]*)?)(?P<exponent>(?:[eE][-+]?[0-9]{1,3})?)"
    r"\s*(?P<after>[$€£¥¢₹₩₽%]?)"
)
_WORDS = re.compile(r"[^\W\d_]+(?:[\s.,;:!?'’&]+[^\W\d_]+)*[.!?]?")
# What only looks like arithmetic: 2020-01-02, 1:1:2, 192.168.0.1; 9:05; 0x10; 2 3.
_CODE = re.compile(r"[0-9]+(?:[-/.:][0-9]+){2,}|[0-9]+:0[0-9]|0[xX][0-9a-fA-F]+|[0-9.,]*[0-9.](?:\s+[0-9.,]*[0-9.])+")
_QUANTITY = re.compile(r"[-+]?[0-9][0-9.,/]*\s*((?:[^\W\d_]+/)?[^\W\d_]+(?:\^[0-9]|[²³])?)")
_COMMAND, _WORD = re.compile(r"\\[A-Za-z]+"), re.compile(r"[^\W\d_]{2,}")
# Names of mathematics that are written without a backslash: words, and formulas all the same.
_FORMULAS = frozenset(
    "and or sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi inf infinity oo mod max "
    "min gcd lcm".split()
)


class _Amount(NamedTuple):
    value: Decimal
    unit: str
    is_whole: bool


def same_answer(first: Any, second: Any) -> bool:
    """
    Returns whether two answers are the same, see the module's text. Symmetric.

    Args:
        first, second (`str`, number or `None`):
            Answers. `None`, NaN and blank texts are no answers.

    Raises:
        TypeError: Something else, such as a list.
    """
    one, other = gold_answer(first), gold_answer(second)
    if one is None or other is None:
        return False
    text, other_text = _plain(one), _plain(other)
    if text.lower() == other_text.lower():
        return bool(text)
    amount, other_amount = _amount(text), _amount(other_text)
    if amount and other_amount:
        if amount.value == other_amount.value and _fits(amount.unit, other_amount.unit):
            return True
        if (amount.is_whole and other_amount.is_whole) or _are_apart(amount, other_amount):
            return False
    units = {_unit(amount, text), _unit(other_amount, other_text)} - {""}
    if _CODE.fullmatch(text) or _CODE.fullmatch(other_text) or len(units) > 1:
        return False
    # To math-verify a word is the product of its letters: "listen" would be "silent".
    words, other_words = _words(text), _words(other_text)
    if _is_text(text) or _is_text(other_text) or (words and other_words and words != other_words):
        return False
    return find_spec("math_verify") is not None and math_process.equal(one, other)


def gold_answer(value: Any) -> str | None:
    """
    Returns the text of an answer as a dataset has it: a text, a number, or `None` (and NaN) for none.

    Raises:
        TypeError: Something else.
    """
    if isinstance(value, str):
        return value.strip() or None
    if value is None:
        return None
    if isinstance(value, Number):  # which Booleans are too
        return str(value) if value == value else None
    raise TypeError(
        f"An answer is text or a number, and {str(value)[:80]!r} is of type {type(value).__name__}. Write one answer "
        "in each row."
    )


def check_gold(column: str, dataset: Any) -> None:
    """
    Refuses a column of right answers that no reward can compare with, before training. Of a streamed dataset the first
    row is looked at.

    Args:
        column (`str`):
            Name of the column.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Data. Without this column there is nothing to check.

    Raises:
        ValueError: The column holds lists, or something else that is neither text nor number.
    """
    feature = (getattr(dataset, "features", None) or {}).get(column)
    try:
        if isinstance(feature, (list, dict)) or hasattr(feature, "feature"):  # several values a row
            raise TypeError(
                f"An answer is text or a number, and the column holds {feature!r}. Write one answer in each row."
            )
        gold_answer(next(iter(dataset), {}).get(column))
    except TypeError as error:
        raise ValueError(f"The column `{column}` of the dataset has no answers to compare with. {error}") from error


def math_equivalent(first: str, second: str) -> bool:
    """
    Returns whether `math-verify` finds two answers equal with either of them as the gold one. What it cannot read, or
    not in time, is different.
    """
    return math_process.equal(first, second)


def is_readable(gold: str) -> bool:
    """Returns whether there is a meaning to compare with: a number, words, or what `math-verify` can read."""
    text = _plain(gold)
    return _amount(text) is not None or _is_text(text) or math_process.read(gold)


def require_math_verify(what: str) -> None:
    """
    Raises before training what would be found out in it.

    Raises:
        ImportError: `math-verify` is not installed.
        RuntimeError: The process in which it runs cannot be started.
    """
    if find_spec("math_verify") is None:
        raise missing("math_verify", f"`{what}`")
    if problem := math_process.problem():
        raise RuntimeError(f"`{what}` needs math-verify, which runs in a process of its own. That failed: {problem}")


def _plain(answer: str) -> str:
    r"""The answer without what only sets it: dollar signs around a formula, `\text{}`, other spellings of signs."""
    text = _WRAPPED.sub(r"\1", answer.strip())
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1]
    for spelling, sign in _SPELLINGS.items():
        text = text.replace(spelling, sign)
    return text.strip().removesuffix(".")


def _amount(text: str) -> _Amount | None:
    found = _NUMBER.fullmatch(text)
    if found is None or (found["before"] and found["after"]) or (found["sign"] and found["minus"]):
        return None
    digits = f"{found['whole'].replace(',', '') or '0'}{found['fraction']}{found['exponent']}"
    value, unit = Decimal(digits), found["before"] or found["after"]
    is_whole = not found["exponent"] and not found["fraction"].strip(".0") and unit != "%"
    return _Amount(-value if "-" in (found["sign"], found["minus"]) else value, unit, is_whole)


def _fits(unit: str, other: str) -> bool:
    return unit == other or ("" in (unit, other) and "%" not in (unit, other))


def _are_apart(one: _Amount, other: _Amount) -> bool:
    """Whether two numbers differ in unit or in their first five digits, which rounding to six places does not see in
    small ones.
    """
    if "%" in (one.unit, other.unit):  # a percentage is two numbers
        return bool({one.unit, other.unit} - {"", "%"})
    difference, size = abs(one.value - other.value), max(abs(one.value), abs(other.value))
    return not _fits(one.unit, other.unit) or difference > size / 100_000


def _unit(amount: _Amount | None, text: str) -> str:
    """The unit of a number with one, a currency or letters; that of a percentage is not."""
    if amount:
        return amount.unit.replace("%", "")
    found = _QUANTITY.fullmatch(text)
    return found[1].lower() if found else ""


def _is_text(text: str) -> bool:
    """Whether an answer is words and nothing else."""
    return bool(_WORDS.fullmatch(text)) and bool(_words(text))


def _words(text: str) -> list[str]:
    return sorted({word.lower() for word in _WORD.findall(_COMMAND.sub(" ", text))} - _FORMULAS)
