import re
from collections import Counter

import pytest

from hf_rb.tiny import extract_answer
from hf_rb.tiny.problems import KINDS, generate


PROBLEMS = list(generate("train", 20_000))
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def test_seven_kinds_with_two_to_five_steps_and_operands_to_99():
    assert {problem.kind for problem in PROBLEMS} == set(KINDS)
    for problem in PROBLEMS[:2000]:
        assert all(2 <= operand <= 99 for operand in problem.operands)
        assert 2 <= len(EQUATION.findall(problem.solution)) <= 5


def test_every_equation_is_true_and_uses_known_numbers():
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}
    for problem in PROBLEMS[:2000]:
        known = set(problem.operands)
        for left, sign, right, value in EQUATION.findall(problem.solution):
            assert apply[sign](int(left), int(right)) == int(value) >= 0
            assert int(left) in known and int(right) in known
            known.add(int(value))
        assert problem.answer == value == extract_answer(problem.solution)
        assert all(str(operand) in problem.question for operand in problem.operands)


def test_answers_are_many_and_none_is_common():
    counts = Counter(problem.answer for problem in PROBLEMS)
    assert len(counts) >= 300
    assert max(counts.values()) / len(PROBLEMS) <= 0.03


def test_splits_share_no_operands():
    train = {(problem.kind, problem.operands) for problem in PROBLEMS}
    test = {(problem.kind, problem.operands) for problem in generate("test", 2000)}
    assert not train & test
    assert {kind for kind, _ in test} == set(KINDS)


def test_same_seed_same_problems():
    assert list(generate("train", 50, seed=3)) == list(generate("train", 50, seed=3))
    assert list(generate("train", 50, seed=3)) != list(generate("train", 50, seed=4))
    # Pinned: a change here changes every published figure of the tiny family.
    assert (
        next(generate("test")).question
        == "Pia has 8 boxes with 19 coins each and 6 bags with 16 coins each. How many coins is that?"
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [("So 2 + 3 = 5. #### 5", "5"), ("#### 1 #### 2\nmore", "2"), ("#### ", None), ("5", None), ("", None)],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_unknown_split():
    with pytest.raises(ValueError, match="write 'train' or 'test'"):
        generate("validation")
