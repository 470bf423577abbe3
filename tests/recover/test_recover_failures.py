"""What quantization has broken, what a repair set is made of, and what of it may not be learned."""

import pytest
from transformers import AutoTokenizer

from hf_rb import tiny
from hf_rb.evaluation import ExactMatch, load_task
from hf_rb.recover import compare_failures
from hf_rb.recover.failures import check_apart, lines, problem_rows, prompts, repair_set, text_rows


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.path("student"))


def result(correct, text):
    texts = [f"{text} {number}" for number in range(len(correct))]
    return ExactMatch(sum(correct) / len(correct), 0.0, {}, 1.0, len(correct), texts, correct)


def test_problems_by_what_became_of_them():
    problems = load_task("tiny:math", 4)
    compared = compare_failures(
        problems, result([True, True, False, False], "full"), result([True, False, True, False], "small")
    )
    (kept,), (flipped,), (gained,), (failed,) = compared.kept, compared.flipped, compared.gained, compared.failed
    assert (kept.before, kept.after) == ("full 0", "small 0")
    assert (flipped.before, flipped.after, flipped.right_before, flipped.right_after) == (
        "full 1",
        "small 1",
        True,
        False,
    )
    assert flipped.prompt == problems[1]["prompt"] and flipped.answer == problems[1]["answer"]
    assert (gained.after, failed.after) == ("small 2", "small 3")
    assert compared.summary() == {
        "flipped": 1, "kept": 1, "gained": 1, "failed": 1, "flipped_by_kind": {problems[1]["kind"]: 1}
    }  # fmt: skip
    assert [row["outcome"] for row in compared.rows()] == ["flipped", "kept", "gained", "failed"]
    with pytest.raises(ValueError, match="4 problems and results of 4 and 3"):
        compare_failures(problems, result([True] * 4, "full"), result([True] * 3, "small"))


def test_the_failing_region_and_ordinary_data():
    flipped, ordinary = list(range(10)), list(range(100, 200))
    failing, rest = repair_set(flipped, ordinary, 20, 0.4, seed=0)
    assert len(failing) == 8 and len(rest) == 12
    assert set(failing) <= set(flipped) and set(rest) <= set(ordinary) and len(set(failing + rest)) == 20
    more, others = repair_set(flipped, ordinary, 40, 0.4, seed=0)  # no more have broken
    assert len(more) == 10 and more[:8] == failing and len(others) == 30
    less, few = repair_set(flipped, ordinary[:5], 12, 0.4, seed=0)  # of ordinary data neither
    assert len(less) == 7 and len(few) == 5
    assert repair_set(flipped, ordinary, 20, 0.4, seed=1)[0] != failing
    assert repair_set([], ordinary, 20, 0.4, seed=0)[1] == repair_set([], ordinary, 30, 0.4, seed=0)[1][:20]


def test_labels_are_on_the_models_own_solution(tokenizer):
    problems = load_task("tiny:math", 1)
    compared = compare_failures(problems, result([True], "Own words, #### 1"), result([False], "no"))
    (row,) = problem_rows(tokenizer, compared.flipped)
    labelled = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(labelled).startswith("Own words, #### 1 0<|im_end|>")
    prompt = row["input_ids"][: row["labels"].count(-100)]
    assert row["input_ids"] == prompt + labelled
    assert prompt == tokenizer.apply_chat_template(problems[0]["prompt"], add_generation_prompt=True)["input_ids"]


def test_windows_of_text(tokenizer):
    text = "Ava has 3 pens and buys 5 more. " * 20
    rows = text_rows(tokenizer, [text, "short"], 32)
    ids = tokenizer(text)["input_ids"]
    assert [row["input_ids"] for row in rows] == [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_what_is_held_out_is_not_learned():
    pool, task = load_task("tiny:math", 30, split="train"), load_task("tiny:math", 10)
    check_apart(prompts(pool), prompts(task), "problems")
    reworded = [
        row | {"prompt": [{"role": "user", "content": row["prompt"][0]["content"].upper() + " "}]} for row in task
    ]
    with pytest.raises(ValueError, match="10 of the 40 problems to learn from are in the evaluation set too"):
        check_apart(prompts(pool + reworded), prompts(task), "problems")
    long = "A line of text that is long enough to be known again when it comes twice."
    assert lines([f"= Title =\n{long}\n", "other"]) == [long]
