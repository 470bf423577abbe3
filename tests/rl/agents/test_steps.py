from types import SimpleNamespace

import pytest
import torch

from hf_rb.advantages.pipeline import ShapingContext
from hf_rb.rl.agents.rewards import answer_f1, is_well_formed, search_f1
from hf_rb.rl.agents.steps import FieldScores, SilverDocuments, search_steps


def call(text=""):
    return {"role": "assistant", "content": text, "tool_calls": [{"function": {"name": "search", "arguments": {}}}]}


def tool(*lines):
    return {"role": "tool", "name": "search", "content": "\n".join(lines)}


def say(text):
    return {"role": "assistant", "content": text}


def rollout(*steps, answer="#### x"):
    return [message for step in steps for message in (call(), tool(*step))] + [say(answer)]


ERROR = "{'error': 'search() missing 1 required positional argument'}"


@pytest.mark.parametrize(
    "completion",
    [
        "a string #### x",
        [],
        [say("#### x")],  # never searched
        rollout("a", answer="no marker"),
        rollout("a", answer="<tool_call>\n{ #### x"),  # a call that did not parse
        rollout("a")[:-1],  # ends on a tool's result
        [*rollout("a")[:-1], call()],  # ends on a call
        [call(), tool(ERROR), say("#### x")],
        [say("text first"), *rollout("a")],
        [{**call(), "content": "</tool_response>"}, tool("a"), say("#### x")],
    ],
)
def test_not_well_formed(completion):
    assert not is_well_formed(completion)
    assert search_f1([completion], ["x"]) == [0.0]


def test_well_formed():
    assert is_well_formed(rollout("a", "b"))
    assert is_well_formed([{"role": "assistant", "tool_calls": [{}]}, tool("a"), say("so #### x")])
    metrics = {}
    completions = [rollout("a"), rollout("a", answer="#### the X, y!"), [say("#### x")]]
    assert search_f1(completions, ["x"] * 3, log_metric=metrics.__setitem__) == pytest.approx([1, 2 / 3, 0])
    assert metrics == pytest.approx({"search/well_formed": 2 / 3, "search/f1": (1 + 2 / 3 + 1) / 3})


@pytest.mark.parametrize(
    "answer, gold, f1",
    [
        ("The Walls and Bridges.", "walls and bridges", 1.0),
        ("walls", "Walls and Bridges", 0.5),
        ("rome rome", "rome", 2 / 3),
        ("", "rome", 0.0),
        (None, "rome", 0.0),
        ("the", "rome", 0.0),
        ("paris", ["rome", "Paris, France"], 2 / 3),
        ("paris", [], 0.0),
        ("1066", 1066, 1.0),
        ("none", None, 0.0),
        ("the U.S.", "US", 1.0),
    ],
)
def test_answer_f1_counts_shared_words(answer, gold, f1):
    assert answer_f1(answer, gold) == pytest.approx(f1)


def test_steps_of_messages():
    completion = [
        call("first"),
        tool("a", "b"),
        {**call("second"), "tool_calls": [{}, {}]},
        tool("c"),
        tool("", "d "),
        call(),
        tool(ERROR),
        call("cut off"),
    ]
    assert search_steps(completion) == [("first", ["a", "b"]), ("second", ["c", "d"]), ("", []), ("cut off", [])]
    # The environment knows better: ids, and only of what it returned itself.
    environment = SimpleNamespace(retrieved={"a\nb": ["p1"], "c": ["p2", "p3"]})
    assert [found for _, found in search_steps(completion, environment)] == [["p1"], ["p2", "p3"], [], []]
    assert search_steps("a string") == []


@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_thoughts_that_a_template_marks(field):
    """TRL parses them into a field of their own; a repeated one is redundant wherever it stands."""
    first, second = ({**call(), field: f"we need the {what} of the film"} for what in ("director", "writer"))
    completion = [first, tool(*"abx"), {**second, "content": "So."}, tool(*"cdy"), say("#### y")]
    steps = search_steps(completion)
    assert [thought for thought, _ in steps] == [
        "we need the director of the film",
        "we need the writer of the film So.",
    ]
    scores = SilverDocuments()(context([rollout("abc", "de"), completion], [1.0, 0.0]))
    assert scores[1] == [pytest.approx(2 / 3), 0.0]


def context(completions, rewards, group_size=2, local=None, gather=list, **fields):
    local = local or slice(0, len(completions))
    rewards = torch.tensor(rewards).view(len(rewards), -1)
    return ShapingContext(
        base=torch.zeros(len(rewards)),
        group_size=group_size,
        rewards_per_func=rewards,
        reward_names=["search_f1", "other"][: rewards.shape[1]],
        valid=~rewards.isnan().all(1),
        mask=torch.ones(len(completions), 4, dtype=torch.bool),
        local=local,
        completions=completions,
        gather=gather,
        **fields,
    )


# The worked example of the paper's rule: silver documents a to e.
GROUP = [
    rollout("abc", "de"),
    rollout("abx", "cay", "cde"),
    rollout("abx", "abc"),
    [call("we need the director of the film"), tool(*"abx"), call("we need the birthplace of the director now"), tool(*"cdy"), say("#### y")],
]  # fmt: skip
QUALITY = [[1.0, 1.0], [2 / 3, 1 / 3, 2 / 3], [2 / 3, 0.0], [2 / 3, 0.0]]


def flat(scores):
    return [pytest.approx(row) for row in scores]


def test_silver_documents():
    ctx = context(GROUP, [1.0, 0.0, 0.0, 0.0], group_size=4)
    assert SilverDocuments()(ctx) == flat(QUALITY)


def test_no_rollout_qualifies():
    ctx = context(GROUP, [0.69, 0.0, 0.0, 0.0], group_size=4)
    assert SilverDocuments()(ctx) == [[0.0] * len(row) for row in QUALITY]
    assert SilverDocuments(qualify=0.6)(ctx) == flat(QUALITY)


def test_a_rollout_of_invalid_form_neither_gives_nor_gets():
    broken = [*GROUP[0][:-1], say("no answer")]
    ctx = context([broken, *GROUP[1:]], [1.0, 0.0, 0.0, 0.0], group_size=4)  # a reward that does not look at the form
    assert SilverDocuments()(ctx) == [[0.0] * len(row) for row in QUALITY]
    ctx = context([GROUP[0], [*GROUP[1][:-1], say("no answer")]], [1.0, 0.0])
    assert SilverDocuments()(ctx) == [[1.0, 1.0], [0.0, 0.0, 0.0]]


def test_an_invalid_form_never_qualifies():
    malformed = [*rollout("abc")[:-1], call("cut off")]
    scores = SilverDocuments(qualify=0.0)(context([malformed, rollout("abx")], [0.0, 0.0]))
    assert scores == [[0.0, 0.0], [1.0]]


def test_a_reward_that_is_none_qualifies_nobody():
    ctx = context(GROUP, [float("nan"), 0.0, 0.0, 0.0], group_size=4)
    assert SilverDocuments()(ctx) == [[0.0] * len(row) for row in QUALITY]


def test_groups_do_not_see_each_other():
    completions = [GROUP[0], GROUP[1], GROUP[0], GROUP[2]]
    everything = [1.0, 0.0, 0.0, 0.0]  # the second group has no silver document
    whole = SilverDocuments()(context(completions, everything))
    assert whole == [flat(QUALITY)[0], flat(QUALITY)[1], [0.0, 0.0], [0.0, 0.0]]


def test_a_group_may_straddle_processes():
    completions = [GROUP[0], GROUP[1], GROUP[0], GROUP[2]]
    rewards = [1.0, 0.0, 0.0, 0.0]
    sent, parts = [], [slice(0, 2), slice(2, 4)]
    for part in parts:
        SilverDocuments()(context(completions[part], rewards, 4, part, gather=lambda own: sent.append(own) or own * 2))
    split = [
        row
        for part in parts
        for row in SilverDocuments()(
            context(completions[part], rewards, 4, part, gather=lambda own: sent[0] + sent[1])
        )
    ]
    assert split == SilverDocuments()(context(completions, rewards, 4))


def test_the_reward_is_named_when_there_are_several():
    rewards = [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="Set `correct_reward` to one of search_f1, other"):
        SilverDocuments()(context(GROUP[:2], rewards))
    assert SilverDocuments(reward="other")(context(GROUP[:2], rewards)) == flat(QUALITY[:2])


def test_scores_that_the_rollouts_bring():
    ctx = context(["a", "b"], [0.0, 1.0], rows=[{"turn_scores": [0.5, 1]}, {"turn_scores": []}])
    assert FieldScores("turn_scores")(ctx) == [[0.5, 1.0], []]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "x"},
            "names a field that the rollouts do not have: return it from `rollout_func`. They have 'prompt'",
        ),
        ({"turn_scores": 0.5}, "one number between 0 and 1 for each search step; got 0.5"),
        ({"turn_scores": [1.5]}, r"got \[1.5\]"),
        ({"turn_scores": [float("nan")]}, r"got \[nan\]"),
        ({"turn_scores": None}, "got None"),
    ],
)
def test_scores_that_are_none(row, message):
    with pytest.raises(ValueError, match=message):
        FieldScores("turn_scores")(context(["a"], [0.0], group_size=1, rows=[row]))
