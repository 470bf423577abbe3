"""All pairs of parameter values in the fast suite, the rest of their product in the slow one."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations, product
from typing import Any, TypeVar

import pytest


__all__ = ["cover", "covering_cases", "pairwise"]

Case = TypeVar("Case", bound=Hashable)


def covering_cases(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """
    Returns cases, as positions in axes of these sizes, in which every two positions of different axes meet. Takes the case with the most
    pairs that are missing, and the first of several such cases, until no pair is missing.
    """
    cases = list(product(*map(range, sizes)))
    return cases if len(sizes) < 2 else cover(cases, lambda case: combinations(enumerate(case), 2))


def cover(cases: Sequence[Case], meetings: Callable[[Case], Iterable[Hashable]]) -> list[Case]:
    """Returns cases in which everything happens that does in any of them, chosen as [`covering_cases`] does. `meetings` says of a
    case what happens in it.
    """
    happens = {case: set(meetings(case)) for case in cases}
    missing = set().union(*happens.values())
    found = []
    while missing:
        found.append(max(cases, key=lambda case: len(missing & happens[case])))
        missing -= happens[found[-1]]
    return found


def pairwise(*axes: tuple[str, Iterable[Any]], indirect: Sequence[str] = ()) -> pytest.MarkDecorator:
    """
    Parametrizes a test by the product of its axes. The cases that [`covering_cases`] leaves out are marked slow.

    Args:
        *axes (`tuple[str, Iterable]`):
            The arguments of `pytest.mark.parametrize` for one axis each: a name and its values, or several names and tuples of
            values. The keys of a dictionary of values stand for them in the test's id.
        indirect (`Sequence[str]`, *optional*, defaults to `()`):
            The names that are fixtures.
    """
    names, columns = [], []
    for name, values in axes:
        several = "," in name
        names += [one.strip() for one in name.split(",")]
        named = values.items() if isinstance(values, dict) else [(getattr(v, "__name__", str(v)), v) for v in values]
        columns.append([(label, value if several else (value,)) for label, value in named])
    fast = set(covering_cases([len(column) for column in columns]))
    parameters = []
    for case in product(*(range(len(column)) for column in columns)):
        chosen = [column[position] for column, position in zip(columns, case, strict=True)]
        parameters.append(
            pytest.param(
                *(value for _, values in chosen for value in values),
                id="-".join(label for label, _ in chosen),
                marks=() if case in fast else pytest.mark.slow,
            )
        )
    return pytest.mark.parametrize(names, parameters, indirect=list(indirect))
