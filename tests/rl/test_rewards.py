import subprocess
import sys
from importlib.util import find_spec

import pytest

from hf_rb.evaluation import is_correct
from hf_rb.rl import answers, math_process
from hf_rb.rl.rewards import (
    EXTRACTORS,
    MARKERS,
    REWARDS,
    answer_format_reward,
    boxed_answer,
    build_reward,
    completion_text,
    exact_answer_reward,
    math_accuracy_reward,
    math_equivalent,
    reward_problem,
    step_format_reward,
    tagged_answer,
)


SEARCH = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search"}}]}
TOOL = {"role": "tool", "content": "\\boxed{4}"}


@pytest.mark.parametrize(
    "completion, text",
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "one"}], "one"),
        ([SEARCH, TOOL, {"role": "assistant", "content": "two"}], "two"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([SEARCH], ""),
        ([{"role": "assistant", "content": None}], ""),
        ([SEARCH, TOOL], ""),  # cut off after the tool has spoken
        ([], ""),
        ("", ""),
    ],
)
def test_what_the_model_wrote_last(completion, text):
    assert completion_text(completion) == text


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{1} then \boxed{ \frac{1}{2} } done", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"cut \boxed{12", None),
        (r"\boxed{1} and cut \boxed{\frac{1}{2}", None),
        (r"\boxed{5} then \boxed{6", None),
        (r"\boxed{3} and \boxed{4}", "4"),
        (r"\boxed{\left\{ x=1 \right.}", r"\left\{ x=1 \right."),
        (r"\boxed{[1,\infty\}}", r"[1,\infty\}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a\\}", r"a\\"),  # a line end, and a brace
        (r"\boxed 5", "5"),
        (r"so $\boxed 5$, and", "5"),
        (r"\boxed 12. Done", "12"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed\frac{1}{2}, so", r"\frac{1}{2}"),
        (r"\boxed \text{no solution} at all", r"\text{no solution}"),
        (r"{\boxed -x}", None),
        (r"\boxed A$", "A"),
        (r"\boxed{5} is my answer in \boxed form", "5"),
        (r"\boxed{5}, as asked, in \boxed.", "5"),
        (r"\boxedness{4}", None),
        (r"\boxed", None),
        (r"\boxed{}", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_boxed(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>Paris</answer>", "Paris"),
        ("<answer>a</answer> no, <answer> b \n</answer>", "b"),
        ("<answer>cut", None),
        ("<answer> </answer>", None),
        ("</answer>", None),
    ],
)
def test_tagged(text, answer):
    assert tagged_answer(text) == answer


def test_every_extractor_has_its_marker():
    assert EXTRACTORS.keys() == MARKERS.keys()
    for name, marker in MARKERS.items():
        text = {"boxed": r"x \boxed{3}", "hashes": "x #### 3", "tag": "x <answer>3</answer>"}[name]
        assert marker in text
        assert EXTRACTORS[name](text) == "3"


def test_exact_answer():
    """Up to case and blanks."""
    completions = [r"\boxed{ Paris }", r"\boxed{Rome}", "Paris", [{"role": "assistant", "content": r"\boxed{paris}"}]]
    assert exact_answer_reward(completions, ["Paris"] * 4, other_column=[1] * 4) == [1.0, 0.0, 0.0, 1.0]


def test_the_gold_answer_may_end_a_solution():
    hashes = EXTRACTORS["hashes"]
    assert exact_answer_reward(["#### 7", "#### 8"], ["3 + 4 = 7. #### 7"] * 2, answer_extractor=hashes) == [1.0, 0.0]


# Completion, right answer, reward of what follows `####` of both.
PAIRS = [
    ("#### 1080", "1,080", 1.0),
    ("#### $18", 18, 1.0),
    ("#### 18.", 18, 1.0),
    ("#### 18.00", 18, 1.0),
    ("#### 7", 7.0, 1.0),
    ("#### 7", "3 + 4 = 7. #### 7", 1.0),
    ("#### 0.00001", 1e-5, 1.0),
    ("#### 12", "1,2", 0.0),
    ("#### Paris", "paris", 1.0),
    ("#### silent", "listen", 0.0),
    ("7", 7, 0.0),
    ("#### None", None, None),
    ("#### nan", float("nan"), None),
    ("#### 7", " ", None),
]


@pytest.mark.parametrize("completion, gold, reward", PAIRS)
def test_rewards_and_evaluation_agree(completion, gold, reward):
    hashes = EXTRACTORS["hashes"]
    assert exact_answer_reward([completion], [gold], answer_extractor=hashes) == [reward]
    assert is_correct(completion, gold) == bool(reward)
    if find_spec("math_verify"):
        assert math_accuracy_reward([completion], [gold], answer_extractor=hashes) == [reward]


@pytest.mark.parametrize("reward", [exact_answer_reward, math_accuracy_reward])
def test_a_list_is_no_answer(reward):
    if reward is math_accuracy_reward:
        pytest.importorskip("math_verify")
    with pytest.raises(
        TypeError, match=r"An answer is text or a number, and \"\['5', 'five'\]\" is of type list. Write one"
    ):
        reward([r"\boxed{5}"], [["5", "five"]])


def test_answer_format():
    assert answer_format_reward([r"\boxed{7}", "seven", ""]) == [1.0, 0.0, 0.0]


def test_step_format():
    """A header of a step, as SRaR finds them, and an answer."""
    texts = ["### Step 1: add\n\\boxed{7}", r"\boxed{7}", "### Step 1: add", r"In step 1: \boxed{7}", ""]
    assert step_format_reward(texts) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert step_format_reward([[{"role": "assistant", "content": texts[0]}]]) == [1.0]


class TestMathVerify:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("math_verify")

    def test_accuracy(self):
        completions = [r"\boxed{0.5}", r"\boxed{\frac{2}{4}}", r"\boxed{2}", "0.5", r"\boxed{\frac{}"]
        assert math_accuracy_reward(completions, [r"\frac{1}{2}"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]

    def test_an_unreadable_solution_scores_nothing(self):
        assert math_accuracy_reward([r"\boxed{2}"], [""]) == [None]

    def test_the_solution_may_end_a_text(self):
        assert math_accuracy_reward([r"\boxed{3}"], [r"Therefore \boxed{3}"]) == [1.0]

    @pytest.mark.parametrize(
        "first, second, equal",
        [
            ("1/2", "0.5", True),
            (r"\frac{1}{2}", "1/2", True),
            ("1,000", "1000", True),
            ("x=5", "5", True),
            ("1<x<2", "(1,2)", True),  # equal with one of them as gold only
            ("(1,2)", "1<x<2", True),
            ("7", "8", False),
            ("", "7", False),
            ("}{", "7", False),
        ],
    )
    def test_equivalence(self, first, second, equal):
        assert math_equivalent(first, second) == equal

    def test_a_solution_that_takes_too_long_costs_no_other_score(self, monkeypatch):
        monkeypatch.setattr(math_process, "SECONDS", 1.0)
        tower = "7^{7^{7^{7}}}"
        assert math_accuracy_reward([rf"\boxed{{{tower}}}", r"\boxed{2}"], [tower] * 2) == [1.0, None]


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs math-verify. Run `pip install 'hf_rb\[math\]'`"):
        math_accuracy_reward(["1"], ["1"])
    with pytest.raises(ImportError, match="`math_accuracy_reward` needs math-verify"):  # before a model is loaded
        build_reward("math_accuracy_reward")


@pytest.mark.parametrize("name", REWARDS)
def test_every_name_is_a_function(name):
    function = build_reward(name, "hashes")
    assert callable(function)
    assert reward_problem(name) is None


def test_ours_take_the_recipes_extractor():
    assert build_reward("exact_answer_reward", "hashes")(["#### 7"], answer=["7"]) == [1.0]
    assert build_reward("exact_answer_reward", "boxed")(["#### 7"], answer=["7"]) == [0.0]


@pytest.mark.parametrize(
    "name, message",
    [
        ("exact_reward", "did you mean 'exact_answer_reward'?"),
        ("zzz", "it must be one of 'exact_answer_reward'"),
        ("os:system", "add `--allow_local_code os:system` if you trust it"),
        (
            "my_lib.rewards.mine",
            "`my_lib.rewards:mine`, and imported only if the command line has `--allow_local_code",
        ),
    ],
)
def test_names_that_are_refused(name, message):
    assert message in reward_problem(name)


def test_names_are_known_without_heavy_imports():
    program = (
        "import sys, hf_rb.rl.rewards; print(*{'torch', 'transformers', 'trl', 'math_verify'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60).strip() == ""
