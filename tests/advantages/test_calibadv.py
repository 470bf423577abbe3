import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_rb.advantages import CalibAdvShaper, ShapingContext, calibadv, run_pipeline, silver_documents, step_quality
from hf_rb.advantages.calibadv import ends_with_tool_call, model_runs
from hf_rb.advantages.search_steps import word_similarity


def grpo(rewards, group_size, eps=1e-4):
    rewards = torch.tensor(rewards, dtype=torch.float32).view(-1, group_size)
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)).flatten()


REWARDS = [1.0, 0.0, 0.0, 0.8]
RUNS = [[5, 4, 6], [5, 3, 10], [8], [4, 4, 5]]
QUALITY = [[1, 1], [1 / 3, 0], [], [2 / 3, 1]]


def masses(calibrated, runs):
    """Sum over the answers' tokens of the positive and of the negative advantages."""
    answers = [(values[-1], row[-1]) for values, row in zip(calibrated, runs, strict=True) if row]
    positive = sum(value * count for value, count in answers if value > 0)
    return positive, sum(-value * count for value, count in answers if value < 0)


def flat(calibrated):
    return torch.tensor([value for values in calibrated for value in values], dtype=torch.float64)


def test_c1_both_steps():
    calibrated = calibadv(grpo(REWARDS, 4), RUNS, QUALITY, 4)
    expected = [
        [1.045446, 1.045446, 1.676854],
        [-0.570243, -0.855365, -0.855365],
        [-0.855365],
        [0.665284, 0.665284, 1.067089],
    ]
    assert_close(flat(calibrated), flat(expected), atol=1e-6, rtol=0)
    assert masses(calibrated, RUNS) == pytest.approx((15.396572, 15.396572), abs=1e-5)


def test_c1_with_the_epsilon_of_verl():
    calibrated = calibadv(grpo(REWARDS, 4, eps=1e-6), RUNS, QUALITY, 4)
    ends = torch.tensor([calibrated[0][0], calibrated[3][0], calibrated[0][-1], calibrated[3][-1], calibrated[2][0]])
    assert_close(ends, torch.tensor([1.045643, 0.665409, 1.677170, 1.067290, -0.855526]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ratio, first, last", [(0.5, 0.838427, 0.533545), (2.0, 3.353709, 2.134178)])
def test_c1_other_ratios(ratio, first, last):
    calibrated = calibadv(grpo(REWARDS, 4), RUNS, QUALITY, 4, pos_neg_ratio=ratio)
    answers = [values[-1] for values in calibrated]
    assert answers == pytest.approx([first, -0.855365, -0.855365, last], abs=1e-6)


@pytest.mark.parametrize("max_gain, answer", [(None, 71.538179), (10.0, 17.884540), (100.0, 71.538179)])
def test_c4_one_short_right_answer(max_gain, answer):
    calibrated = calibadv(grpo([1, 0, 0, 0, 0], 5), [[5], [200], [200], [200], [200]], [[]] * 5, 5, max_gain=max_gain)
    assert calibrated[0][0] == pytest.approx(answer, abs=1e-5)
    assert_close(flat(calibrated[1:]), grpo([1, 0, 0, 0, 0], 5)[1:].double())


def test_groups_without_either_sign_get_no_answer_advantage():
    assert calibadv([1.0, -1.0], [[3, 4], [2, 0]], [[0.5], [0.5]], 2) == [
        [1.0, 0.0],
        [-0.5, 0.0],
    ]  # no negative answer
    assert calibadv([0.0, 0.0], [[3, 4], [2]], [[1], []], 2) == [[0.0, 0.0], [0.0]]  # no variance
    assert calibadv([1.0, -1.0], [[], [2]], [[], []], 2) == [[], [0.0]]
    assert calibadv([0.5], [[3]], [[]], 1) == [[0.0]]
    assert calibadv([], [], [], 4) == []


def test_nan_counts_nowhere():
    with_nan = calibadv([1.0, -0.5, math.nan], [[2], [4], [3, 9]], [[], [], [1]], 3)
    assert with_nan[:2] == [[1.0], [-0.5]]
    assert all(map(math.isnan, with_nan[2]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pos_neg_ratio": 0}, "above 0"),
        ({"pos_neg_ratio": math.nan}, "above 0"),
        ({"max_gain": 0.5}, "at least 1"),
        ({"group_size": 3}, "whole groups"),
        ({"runs": RUNS[:3]}, "3 of `runs`"),
        ({"quality": [[1, 1], [1], [], [1, 1]]}, "rollout 1 has 3 runs and 1 entries"),
        ({"quality": [[1, 1], [1, 2], [], [1, 1]]}, "between 0 and 1"),
        ({"quality": [[1, 1], [1, math.nan], [], [1, 1]]}, "between 0 and 1"),
    ],
)
def test_refusals(change, message):
    given = {"advantages": grpo(REWARDS, 4), "runs": RUNS, "quality": QUALITY, "group_size": 4}
    with pytest.raises(ValueError, match=message):
        calibadv(**{**given, **change})


# Properties.


@st.composite
def rollouts(draw):
    group_size = draw(st.integers(1, 6))
    n = group_size * draw(st.integers(1, 3))
    values = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(0.01, 3), st.floats(-3, -0.01))
    advantages = draw(st.lists(values, min_size=n, max_size=n))
    runs = draw(st.lists(st.lists(st.integers(1, 50), max_size=4), min_size=n, max_size=n))
    quality = [
        draw(st.lists(st.floats(0, 1), min_size=max(len(row) - 1, 0), max_size=max(len(row) - 1, 0))) for row in runs
    ]
    return torch.tensor(advantages, dtype=torch.float64), runs, quality, group_size


@given(rollouts(), st.floats(0.1, 4), st.one_of(st.none(), st.floats(1, 20)))
def test_invariants(given, ratio, max_gain):
    advantages, runs, quality, group_size = given
    calibrated = calibadv(*given, ratio, max_gain)
    for a, row, q, values in zip(advantages.tolist(), runs, quality, calibrated, strict=True):
        assert len(values) == len(row)
        for value, q_t in zip(values, q, strict=False):
            if a >= 0:
                assert value == a
            else:
                assert a <= value <= 0
                assert q_t != 0 or value == a
                assert q_t != 1 or value == 0
    for start in range(0, len(runs), group_size):
        group = slice(start, start + group_size)
        before = masses([[a] for a in advantages[group].tolist()], [row[-1:] or [0] for row in runs[group]])
        positive, negative = masses(calibrated[group], runs[group])
        if 0 in before:
            assert (positive, negative) == (0, 0)
        else:
            gain = min(ratio * before[1] / before[0], max_gain or math.inf)
            assert negative == before[1]
            assert positive == pytest.approx(gain * before[0])
            if max_gain is None:
                assert positive == pytest.approx(ratio * negative)


@given(rollouts())
def test_switched_off_is_the_identity(given):
    advantages, runs, quality, group_size = given
    calibrated = calibadv(advantages, runs, [[0] * len(q) for q in quality], group_size, pos_neg_ratio=None)
    assert calibrated == [[a] * len(row) for a, row in zip(advantages.tolist(), runs, strict=True)]


@given(rollouts(), st.floats(0, 1))
def test_monotone_in_quality(given, share):
    advantages, runs, quality, group_size = given
    less = calibadv(*given)
    more = calibadv(advantages, runs, [[q_t + share * (1 - q_t) for q_t in q] for q in quality], group_size)
    assert (flat(more) >= flat(less) - 1e-12).all()


@given(rollouts(), st.randoms(use_true_random=False))
def test_order_and_scale(given, random):
    advantages, runs, quality, group_size = given
    calibrated = calibadv(*given)
    order = [
        i
        for start in range(0, len(runs), group_size)
        for i in random.sample(range(start, start + group_size), group_size)
    ]
    permuted = calibadv(advantages[order], [runs[i] for i in order], [quality[i] for i in order], group_size)
    assert_close(flat(permuted), flat([calibrated[i] for i in order]))
    assert_close(flat(calibadv(2 * advantages, runs, quality, group_size)), 2 * flat(calibrated))


# Step quality from documents.

SILVER = set("abcde")
FIRST = "we need the director of the film"


@pytest.mark.parametrize(
    "documents, thoughts, expected",
    [
        (["abx", "cay", "cde"], None, [2 / 3, 1 / 3, 2 / 3]),  # the second a and c are not new
        (["abx", "abc"], None, [2 / 3, 0]),  # two documents in common
        (["abx", "cdy"], [FIRST, "we need the birthplace of the director now"], [2 / 3, 0]),  # similarity 0.625
        (["abx", "cdy"], [FIRST, "now search where that person was born"], [2 / 3, 2 / 3]),
        (["abx", "cdy"], ["", ""], [2 / 3, 2 / 3]),  # no thought is no repetition
        (["", "abc"], None, [0, 1]),
        ([], None, []),
    ],
)
def test_c3_step_quality(documents, thoughts, expected):
    assert step_quality(documents, SILVER, thoughts) == pytest.approx(expected)
    assert step_quality(documents, set(), thoughts) == [0] * len(expected)


def test_silver_documents_come_from_the_best_rollouts():
    documents = [["ab", "c"], ["ad"], ["xyz"], ["q"], ["b"], ["m"], [], ["k"]]
    rewards = torch.tensor([0.8, 0.8, 0.75, 0.6, 0.0, math.nan, 0.69, 0.69])
    assert silver_documents(rewards, documents, 4) == [set("abcd"), set()]
    assert silver_documents(rewards, documents, 4, qualify=0.69) == [set("abcd"), {"k"}]


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.7, 0.9, 1.0]), st.lists(st.text("abcdef", max_size=3), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_silver_documents_do_not_depend_on_order_or_failures(group, random):
    def silver(rollouts):
        return silver_documents([r for r, _ in rollouts], [d for _, d in rollouts], len(rollouts))[0]

    expected = silver(group)
    assert silver(random.sample(group, len(group))) == expected
    assert silver([*group, (max(r for r, _ in group), [])]) == expected  # a rollout without documents
    assert silver([*group, (0.0, ["xyz"])]) == expected  # an invalid format: reward 0


def edit_distance(first, second):
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


words = st.lists(st.sampled_from(["we", "need", "the", "film"]), max_size=80)


@given(words, words)
def test_word_similarity_is_the_edit_distance(first, second):
    longest = max(len(first), len(second))
    expected = 1 - edit_distance(first, second) / longest if longest else 0
    assert word_similarity(" ".join(first), " ".join(second)) == pytest.approx(expected)


# The shaper.


def test_runs_of_model_tokens():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0, 1], [0] * 8, [1] * 8], dtype=torch.bool)
    assert model_runs(mask) == [[(0, 2), (4, 7)], [(1, 4), (7, 8)], [], [(0, 8)]]


CALL = {"role": "assistant", "tool_calls": [{}]}
RESULT = {"role": "tool", "content": "d"}
ANSWER = {"role": "assistant", "content": "Paris", "tool_calls": None}


@pytest.mark.parametrize(
    "completion, runs, expected",
    [
        ("text", 1, False),
        ([], 0, False),
        ([ANSWER], 1, False),
        ([CALL], 1, True),
        ([CALL, RESULT], 1, True),
        ([CALL, RESULT, CALL], 2, True),
        ([CALL, RESULT, ANSWER], 2, False),
        ([CALL], 2, False),  # a `rollout_func`'s turns, which TRL parses as one message with the calls of all
    ],
)
def test_ends_with_tool_call(completion, runs, expected):
    assert ends_with_tool_call(completion, runs) is expected


def context(base, runs, group_size, completions=None, valid=None):
    """Runs of model tokens with two tool tokens between them, right-padded."""
    rows = [[1] * row[0] + [t for count in row[1:] for t in [0, 0, *[1] * count]] if row else [] for row in runs]
    width = max(map(len, rows)) + 2
    mask = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.bool)
    n = len(base)
    return ShapingContext(
        base=base,
        group_size=group_size,
        rewards_per_func=torch.zeros(n, 1),
        reward_names=["f1"],
        valid=torch.ones(n, dtype=torch.bool) if valid is None else torch.tensor(valid),
        completions=completions or ["text"] * len(runs),
        mask=mask,
    )


def test_shaper_spreads_the_runs_over_the_tokens():
    base = grpo(REWARDS, 4)
    ctx = context(base, RUNS, 4)
    advantages, metrics, columns = run_pipeline(ctx, [CalibAdvShaper(lambda ctx: QUALITY)])
    for row, spans, values in zip(advantages, model_runs(ctx.mask), calibadv(base, RUNS, QUALITY, 4), strict=True):
        for (start, stop), value in zip(spans, values, strict=True):
            assert_close(row[start:stop], torch.full((stop - start,), value))
    assert (advantages[~ctx.mask] == 0).all()
    assert columns["step_quality"] == ["1.00 1.00", "0.33 0.00", "", "0.67 1.00"]
    own = {key.removeprefix("shaping/calibadv/"): value for key, value in metrics.items()}
    assert own["steps_per_rollout"] == 1.5
    assert own["step_quality"] == pytest.approx(4 / 6)
    assert own["steps_relieved"] == pytest.approx(1 / 6)
    assert own["gain"] == own["gain_max"] == pytest.approx(15.396572 / 9.599097)


def test_a_rollout_that_ends_on_a_tool_call_has_no_answer():
    base = grpo([1.0, 0.0, 0.0], 3)
    ctx = context(base, [[3], [2, 4], [5]], 3, [[ANSWER], [CALL, RESULT, CALL], [ANSWER]])
    advantages = run_pipeline(ctx, [CalibAdvShaper(lambda ctx: [[], [0, 0.5], []])])[0]
    assert advantages[1, 4].item() == pytest.approx(base[1].item() / 2)  # a search step, half useful
    assert advantages[0, 0].item() == pytest.approx(5 * -base[2].item() / 3)  # balanced against the one wrong answer
    as_code = CalibAdvShaper(lambda ctx: [[], [0, 0.5], []], answer_must_not_call_tool=False)
    assert run_pipeline(ctx, [as_code])[0][1, 4].item() == pytest.approx(base[1].item())


def test_the_turns_of_a_rollout_func_have_an_answer():
    """TRL parses them as one message, which holds the calls of all turns."""
    base = grpo([1.0, 0.0], 2)
    ctx = context(base, [[2, 3], [2, 6]], 2, [[CALL], [CALL]])
    advantages, metrics, _ = run_pipeline(ctx, [CalibAdvShaper(lambda ctx: [[0], [1]])])
    assert advantages[1, 0] == 0 and advantages[1, 4] == base[1]
    assert advantages[0, 4].item() == pytest.approx(2 * base[0].item())
    assert metrics["shaping/calibadv/steps_per_rollout"] == 1


def test_balance_of_a_loss_that_averages_over_each_rollout():
    """There a token weighs 1 / L, and the answers of the two signs weigh the same in the loss, not in tokens."""
    base = grpo(REWARDS, 4)
    ctx = context(base, RUNS, 4)
    advantages, metrics, _ = run_pipeline(ctx, [CalibAdvShaper(lambda ctx: QUALITY, sequence_mean=True)])
    share = [sum(row[-1:]) / sum(row) for row in RUNS]
    answers = [advantages[i, spans[-1][0]].item() for i, spans in enumerate(model_runs(ctx.mask))]
    positive = sum(a * s for a, s in zip(answers, share, strict=True) if a > 0)
    negative = -sum(a * s for a, s in zip(answers, share, strict=True) if a < 0)
    assert positive == pytest.approx(negative) and answers[1:3] == pytest.approx(base[1:3].tolist())
    by_hand = (share[1] * base[1] + share[2] * base[2]) / -(share[0] * base[0] + share[3] * base[3])
    assert metrics["shaping/calibadv/gain"] == pytest.approx(by_hand.item())
    equal = calibadv(base, RUNS, QUALITY, 4, weights=[0.25] * 4)
    assert_close(flat(equal), flat(calibadv(base, RUNS, QUALITY, 4)))


def test_groups_whose_answers_have_one_sign_are_counted():
    base = torch.cat([grpo([1.0, 0.0], 2), grpo([1.0, 0.0], 2), torch.zeros(2)])
    ctx = context(base, [[3], [4]] * 3, 2, [[ANSWER], [CALL], *[[ANSWER]] * 4])
    advantages, metrics, _ = run_pipeline(ctx, [CalibAdvShaper(lambda ctx: [[]] * 6)])
    assert metrics["shaping/calibadv/groups_one_sided"] == 1
    assert metrics["shaping/calibadv/gain"] == pytest.approx(4 / 3)
    assert advantages[0, 0] == 0 and advantages[1, 0] == base[1] and advantages[2, 0] > 0


def test_unscored_and_masked_rollouts_count_nowhere():
    base = grpo([1.0, 0.0, 0.0, 0.0], 4)
    ctx = context(base, [[2], [4], [], [9]], 4, valid=[True, True, True, False])
    advantages = run_pipeline(ctx, [CalibAdvShaper(lambda ctx: [[], [], [1, 1], []])])[0]
    assert advantages[0, 0].item() == pytest.approx(2 * -base[1].item())
    assert (advantages[2:] == 0).all()


def test_soft_penalty_needs_a_scorer():
    with pytest.raises(ValueError, match="step_scorer.*calibadv_soft: false"):
        CalibAdvShaper()
    base = grpo(REWARDS, 4)
    advantages = run_pipeline(context(base, RUNS, 4), [CalibAdvShaper(soft=False, pos_neg_ratio=None)])[0]
    ctx = context(base, RUNS, 4)
    assert_close(advantages, base[:, None] * ctx.mask)


def test_calibadv_costs_little_processor_time(one_thread):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (4096, 4), generator=generator).tolist()
    base, quality = grpo(torch.rand(4096, generator=generator).tolist(), 16), [[0.0, 0.5, 1.0]] * 4096
    thoughts = [" ".join(map(str, torch.randint(5, (256,), generator=generator).tolist())) for _ in range(4)]
    times = []
    for _ in range(3):
        start = time.process_time()
        calibadv(base, lengths, quality, 16)
        middle = time.process_time()
        for _ in range(16):  # a group of 16 rollouts with four thoughts of 256 words
            step_quality(["ab", "c", "d", "e"], SILVER, thoughts)
        times.append((middle - start, time.process_time() - middle))
    assert min(calibration for calibration, _ in times) < 0.1  # about 15 ms
    assert min(scoring for _, scoring in times) < 0.1  # about 15 ms
