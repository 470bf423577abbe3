"""Arithmetic word problems with worked solutions, made by a seeded generator.

Seven kinds, two to five steps, operands up to 99. A problem belongs to the test split exactly when the hash of its
kind and operands says so, so the two splits share no (kind, operands) pair however many problems are drawn from
either.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice


__all__ = ["KINDS", "Problem", "extract_answer", "generate"]

NAMES = [
    "Ava",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ivan",
    "Jo",
    "Kai",
    "Lena",
    "Max",
    "Nora",
    "Omar",
    "Pia",
]
ITEMS = ["pens", "books", "cups", "balls", "caps", "keys", "maps", "bells", "cards", "coins", "shells", "stamps"]
FIRST, NEXT, LAST = (
    ("First", "To begin", "Start with"),
    ("Then", "Next", "Now", "After that"),
    ("Finally", "So", "At last"),
)
TEST_SHARE = 20  # one (kind, operands) pair in 20 is held out


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        kind (`str`): One of `KINDS`.
        operands (`tuple[int, ...]`): The numbers given in the question, 2 to 99.
        question (`str`): The text a user asks.
        equations (`tuple[str, ...]`): The steps, as `12 + 7 = 19`.
        solution (`str`): One sentence an equation, then `#### answer`.
        answer (`str`): The answer in decimal digits.
    """

    kind: str
    operands: tuple[int, ...]
    question: str
    equations: tuple[str, ...]
    solution: str
    answer: str

    @property
    def held_out(self) -> bool:
        return _hash(self.kind, self.operands) % TEST_SHARE == 0

    @property
    def rubric(self) -> str:
        """Rubric for a judge of steps, one item a line: each equation, any that does not hold, the answer."""
        wanted = [f"<SUGGEST> {equation}" for equation in self.equations]
        return "\n".join([*wanted, "<PITFALL> an equation that does not hold", f"<ANSWER> {self.answer}"])


def _hash(*key: object) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


class _Steps:
    """Collects the equations of a solution; every method returns the value of the equation it adds."""

    def __init__(self):
        self.equations: list[str] = []

    def _add(self, left: int, sign: str, right: int, value: int) -> int:
        self.equations.append(f"{left} {sign} {right} = {value}")
        return value

    def plus(self, a: int, b: int) -> int:
        return self._add(a, "+", b, a + b)

    def minus(self, a: int, b: int) -> int:
        return self._add(a, "-", b, a - b)

    def times(self, a: int, b: int) -> int:
        return self._add(a, "*", b, a * b)

    def over(self, a: int, b: int) -> int:
        return self._add(a, "/", b, a // b)


# A kind is a function (rng, steps) -> (operands, question templates, answer), or None when the drawn operands do not
# fit.
_Draw = tuple[tuple[int, ...], tuple[str, ...], int] | None


def _purchase(rng: random.Random, steps: _Steps) -> _Draw:
    count, price, paid = rng.randint(2, 9), rng.randint(2, 24), rng.randint(10, 99)
    if count * price >= paid:
        return None
    return (
        (count, price, paid),
        (
            "{name} buys {0} {items} at {1} coins each and pays with {2} coins. How many coins does {name} get back?",
            "{0} {items} cost {1} coins each. {name} buys them and pays {2} coins. How much change is there?",
        ),
        steps.minus(paid, steps.times(count, price)),
    )


def _gather(rng: random.Random, steps: _Steps) -> _Draw:
    a, b, c = (rng.randint(2, 99) for _ in range(3))
    return (
        (a, b, c),
        (
            "{name} finds {0} {items} on Monday, {1} on Tuesday and {2} on Friday. How many {items} does {name} find?",
            "There are {0} red, {1} blue and {2} green {items}. How many {items} are there in all?",
        ),
        steps.plus(steps.plus(a, b), c),
    )


def _ledger(rng: random.Random, steps: _Steps) -> _Draw:
    a, b, c, d = (rng.randint(2, 99) for _ in range(4))
    if a + b <= c:
        return None
    return (
        (a, b, c, d),
        (
            "{name} has {0} {items}, gets {1} more, gives away {2} and then finds {3}. How many {items} does {name} "
            "have now?",
            "A shop has {0} {items}. {1} arrive, {2} are sold and {3} come back. How many {items} are in the shop?",
        ),
        steps.plus(steps.minus(steps.plus(a, b), c), d),
    )


def _boxes(rng: random.Random, steps: _Steps) -> _Draw:
    n, p, m, q = rng.randint(2, 9), rng.randint(2, 25), rng.randint(2, 9), rng.randint(2, 25)
    return (
        (n, p, m, q),
        (
            "{name} has {0} boxes with {1} {items} each and {2} bags with {3} {items} each. How many {items} is that?",
            "{0} shelves hold {1} {items} each and {2} shelves hold {3} each. How many {items} are on the shelves?",
        ),
        steps.plus(steps.times(n, p), steps.times(m, q)),
    )


def _share(rng: random.Random, steps: _Steps) -> _Draw:
    friends, part, lost, a = rng.randint(2, 9), rng.randint(2, 20), rng.randint(2, 40), rng.randint(2, 99)
    b = friends * part + lost - a
    if not 2 <= b <= 99:
        return None
    return (
        (a, b, lost, friends),
        (
            "{name} has {0} red and {1} white {items}, loses {2} and shares the rest among {3} friends. How many "
            "does each get?",
            "{0} {items} and {1} more are put together, {2} are broken, and the rest goes into {3} equal piles. How "
            "many are in a pile?",
        ),
        steps.over(steps.minus(steps.plus(a, b), lost), friends),
    )


def _compare(rng: random.Random, steps: _Steps) -> _Draw:
    a, more, fewer = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 99)
    if a + more <= fewer:
        return None
    second = steps.plus(a, more)
    third = steps.minus(second, fewer)
    return (
        (a, more, fewer),
        (
            "{name} has {0} {items}. {other} has {1} more than {name}. {third} has {2} fewer than {other}. How many "
            "do they have together?",
            "{name} picks {0} {items}, {other} picks {1} more than {name}, {third} picks {2} fewer than {other}. How "
            "many in all?",
        ),
        steps.plus(steps.plus(a, second), third),
    )


def _savings(rng: random.Random, steps: _Steps) -> _Draw:
    weekly, weeks, gift = rng.randint(2, 24), rng.randint(2, 9), rng.randint(2, 99)
    count, price, found = rng.randint(2, 9), rng.randint(2, 19), rng.randint(2, 99)
    if weekly * weeks + gift <= count * price:
        return None
    purse = steps.plus(steps.times(weekly, weeks), gift)
    rest = steps.minus(purse, steps.times(count, price))
    return (
        (weekly, weeks, gift, count, price, found),
        (
            "{name} saves {0} coins a week for {1} weeks and gets {2} as a gift, buys {3} {items} at {4} each and "
            "finds {5} coins. How many coins does {name} have?",
            "For {1} weeks {name} earns {0} coins a week, and {2} on top. {name} pays for {3} {items} at {4} each "
            "and wins {5} coins. How many coins are left?",
        ),
        steps.plus(rest, found),
    )


KINDS: dict[str, Callable[[random.Random, _Steps], _Draw]] = {
    "purchase": _purchase,
    "gather": _gather,
    "ledger": _ledger,
    "boxes": _boxes,
    "share": _share,
    "compare": _compare,
    "savings": _savings,
}


def _draw(rng: random.Random) -> Problem:
    kind = rng.choice(list(KINDS))
    while True:
        steps = _Steps()
        if (draw := KINDS[kind](rng, steps)) is not None:
            break
    operands, templates, answer = draw
    name, other, third = rng.sample(NAMES, 3)
    question = rng.choice(templates).format(*operands, name=name, other=other, third=third, items=rng.choice(ITEMS))
    openers = [FIRST, *[NEXT] * (len(steps.equations) - 2), LAST]
    sentences = [f"{rng.choice(words)} {equation}." for words, equation in zip(openers, steps.equations, strict=True)]
    solution = " ".join([*sentences, f"#### {answer}"])
    return Problem(kind, operands, question, tuple(steps.equations), solution, str(answer))


def generate(split: str = "train", size: int | None = None, seed: int = 0) -> Iterator[Problem]:
    """Yields problems of one split, the same ones for the same arguments on every machine.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`.
        size (`int`, *optional*):
            How many; endless when `None`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Raises:
        ValueError: `split` is neither of the two.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} does not exist: write 'train' or 'test'")
    rng = random.Random(_hash("problems", seed, split))
    problems = (problem for problem in iter(lambda: _draw(rng), None) if problem.held_out == (split == "test"))
    return islice(problems, size)


def extract_answer(text: str) -> str | None:
    """Returns what follows the last `####` of `text` on its line, or `None` when there is nothing."""
    _, marker, tail = text.rpartition("####")
    answer = tail.strip().partition("\n")[0].strip()
    return answer if marker and answer else None
