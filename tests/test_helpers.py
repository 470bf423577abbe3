"""The helpers that decide which cases the fast suite runs."""

from itertools import combinations, product

import pytest
from helpers.pairwise import covering_cases, pairwise


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (3, 8, 3, 4), (4, 4, 7), (2, 2, 2, 2, 2), (1, 3, 1)], ids=str)
def test_covering_cases_hold_every_pair(sizes):
    cases = covering_cases(sizes)
    assert len(set(cases)) == len(cases)
    for (first, left), (second, right) in combinations(enumerate(sizes), 2):
        assert {(case[first], case[second]) for case in cases} == set(product(range(left), range(right)))


def test_covering_cases_are_few_and_always_the_same():
    assert covering_cases((3, 8, 3, 4)) == covering_cases((3, 8, 3, 4))
    assert 8 * 4 <= len(covering_cases((3, 8, 3, 4))) <= 40  # of 288


def test_pairwise_keeps_the_product_and_marks_the_rest_slow():
    mark = pairwise(("a, b", [(1, 2), (3, 4)]), ("c", {"one": 5, "two": 6, "three": 7}), ("d", [8, 9]), indirect=["d"])
    names, cases = mark.args
    assert names == ["a", "b", "c", "d"] and mark.kwargs == {"indirect": ["d"]}
    assert [case.values for case in cases] == [
        (*ab, c, d) for ab, c, d in product([(1, 2), (3, 4)], [5, 6, 7], [8, 9])
    ]
    assert cases[1].id == "(1, 2)-one-9"
    fast = [case.values for case in cases if not case.marks]
    assert {(c, d) for *_, c, d in fast} == set(product([5, 6, 7], [8, 9])) and len(fast) < len(cases)
    assert {mark.name for case in cases for mark in case.marks} == {"slow"}
