import math
import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_rb.advantages import EdasShaper, ShapingContext, edas, edas_warmup
from hf_rb.advantages.edas import NO_ANSWER, error_classes


def grpo(rewards, group_size, eps=1e-4, scale=True):
    rewards = torch.tensor(rewards, dtype=torch.float32).view(-1, group_size)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + eps) if scale else centred).flatten()


RIGHT3 = [True] * 3 + [False] * 5
MIXED = ["1", "1", "1", "7", "7", "7", "12", ""]
SAME = ["1", "1", "1", "7", "7", "7", "7", "7"]


@pytest.mark.parametrize(
    "base, expected",
    [
        (grpo(RIGHT3, 8), [1.207381] * 3 + [-0.803549] * 3 + [-0.605749] * 2),
        (grpo(RIGHT3, 8, eps=1e-6), [1.207612] * 3 + [-0.803703] * 3 + [-0.605865] * 2),
        (grpo(RIGHT3, 8, scale=False), [0.625] * 3 + [-0.415956] * 3 + [-0.313565] * 2),
    ],
    ids=["trl", "verl", "dr_grpo"],
)
def test_e1_several_errors(base, expected):
    shaped = edas(base, 8, RIGHT3, MIXED)
    assert_close(shaped, torch.tensor(expected), atol=1e-6, rtol=0)
    assert shaped.sum().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("beta, expected", [(0.3, -0.941758), (0.2, -0.869315)])
def test_e2_one_error(beta, expected):
    base = grpo(RIGHT3, 8)
    shaped = edas(base, 8, RIGHT3, SAME, beta=beta)
    assert_close(shaped[3:], torch.full((5,), expected), atol=1e-6, rtol=0)
    assert_close(shaped[3:], (1 + beta) * base[3:])
    assert shaped.sum().item() == pytest.approx(5 * -beta * 0.724429, abs=1e-5)


def test_e3_the_clip_binds():
    shaped = edas(grpo(RIGHT3, 8), 8, RIGHT3, MIXED, alpha=1, kappa=4)
    expected = torch.tensor([1.207381] * 3 + [-0.905536] * 3 + [-0.543322] * 2)
    assert_close(shaped, expected, atol=1e-6, rtol=0)
    assert shaped.sum().item() == pytest.approx(-0.181107, abs=2e-6)


@pytest.mark.parametrize(
    "no_answer, expected",
    [
        ("cluster", [-0.680628] * 2 + [-0.753630] * 3),
        ("skip", [-0.869315] * 2 + [-0.724429] * 3),
        ("singleton", [-0.799308] * 2 + [-0.674510] * 3),
    ],
)
def test_e6_no_answer(no_answer, expected):
    answers = ["1", "1", "1", "7", "7", None, "", "  "]
    shaped = edas(grpo(RIGHT3, 8), 8, RIGHT3, answers, beta=0.2, no_answer=no_answer)
    assert_close(shaped[3:], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "sizes, tilt", [((4, 1, 1, 1, 1), -0.333), ((7, 1), 0.819), ((9, 1), 0.859), ((4, 1, 1, 1, 1, 1, 1), -0.361)]
)
def test_range_of_the_tilt(sizes, tilt):
    # T of the extreme partitions of 8 and 10 wrong rollouts: the largest class at the minimum, the rarest at the maximum.
    n = sum(sizes)
    answers = [str(k) for k, size in enumerate(sizes) for _ in range(size)]
    shaped = edas(-torch.ones(n), n, [False] * n, answers, alpha=0.1)
    extreme = shaped[0] if tilt < 0 else shaped[-1]
    assert (extreme.item() + 1) / 0.1 == pytest.approx(tilt, abs=1e-3)


def test_jump_between_one_error_and_two():
    base, wrong = -torch.ones(8), [False] * 8
    assert -edas(base, 8, wrong, ["a"] * 7 + ["b"])[0].item() == pytest.approx(1.047, abs=1e-3)
    assert -edas(base, 8, wrong, ["a"] * 8)[0].item() == pytest.approx(1.3)


def test_groups_that_do_not_learn():
    zeros = torch.zeros(4)
    assert_close(edas(zeros, 4, [True] * 4, ["1"] * 4), zeros)
    assert_close(edas(zeros, 4, [False] * 4, ["1", "1", "2", None]), zeros)  # S = 0: all wrong, one reward
    one_wrong = grpo([1, 1, 1, 0], 4)
    assert torch.equal(edas(one_wrong, 4, [True] * 3 + [False], ["1"] * 4), one_wrong)
    assert torch.equal(edas(torch.tensor([-1.0, 2.0]), 1, [False, True], ["a", "b"]), torch.tensor([-1.0, 2.0]))
    assert edas(torch.zeros(0), 8, [], []).shape == (0,)


def test_positive_advantages_of_wrong_rollouts_keep_their_sign():
    base = torch.tensor([1.0, -1.0, 0.4, -0.4])  # a length penalty makes wrong rewards differ
    shaped = edas(base, 4, [True, False, False, False], ["1", "7", "7", "7"], beta=0.3)
    assert_close(shaped, torch.tensor([1.0, -1.18, 0.22, -0.58]))


def test_nan_counts_nowhere():
    base = torch.tensor([1.0, -0.5, -0.5, torch.nan])
    shaped = edas(base, 4, [True, False, False, False], ["1", "7", "8", "7"])
    assert_close(shaped, base, equal_nan=True)  # 7 and 8, once each: equally frequent


def test_answers_are_compared_in_lower_case_without_space():
    assert error_classes([" A", "a ", "B", None], [True] * 4, 4) == ([0, 0, 1, 2], ["a", "b", ""])


def test_equivalent_answers_are_one_error():
    calls = []

    def equivalent(first, second):
        calls.append((first, second))
        return float(first) == float(second)

    answers = ["0.5", ".50", "0.50", "2", "0.5", "2.0", "1", None]
    classes, names = error_classes(answers, [True] * 8, 8, equivalent=equivalent)
    assert [names[k] for k in classes] == [".50", ".50", ".50", "2", ".50", "2", "1", ""]
    assert len(calls) == len(set(calls))  # identical strings are never compared again
    assert error_classes(answers[::-1], [True] * 8, 8, equivalent=equivalent)[0] == classes[::-1]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_classes_do_not_depend_on_the_order_of_rollouts(values, random):
    def close(first, second):  # not transitive: 1 and 2, 2 and 3, but not 1 and 3
        return abs(int(first) - int(second)) <= 1

    def names(values):
        classes, names = error_classes(list(map(str, values)), [True] * len(values), len(values), equivalent=close)
        return {value: names[k] for value, k in zip(values, classes, strict=True)}

    assert names(values) == names(random.sample(values, len(values)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kappa": 1.0}, "kappa > 1"),
        ({"alpha": -0.1}, "alpha >= 0"),
        ({"beta": -1}, "beta >= 0"),
        ({"no_answer": "drop"}, "'cluster', 'skip', 'singleton'"),
        ({"group_size": 3}, "whole groups"),
        ({"answers": ["1"]}, "1 answers"),
        ({"correct": [True]}, "one entry a rollout"),
    ],
)
def test_refusals(change, message):
    given = {"advantages": grpo(RIGHT3, 8), "group_size": 8, "correct": RIGHT3, "answers": MIXED}
    with pytest.raises(ValueError, match=message):
        edas(**{**given, **change})


def test_warmup():
    assert [edas_warmup(step) for step in (0, 7)] == [1, 1]
    assert [edas_warmup(step, start=2) for step in (1, 2)] == [0, 1]
    assert [edas_warmup(step, start=2, steps=4) for step in (1, 2, 3, 6, 9)] == [0, 0, 0.25, 1, 1]


# Properties.


def reference(advantages, group_size, correct, answers, alpha, beta, kappa, no_answer):
    """The definition, one rollout at a time."""
    shaped = list(advantages)
    for start in range(0, len(shaped), group_size):
        keys = {}
        for i in range(start, start + group_size):
            key = (answers[i] or "").strip().lower() or {"cluster": "", "skip": None, "singleton": i}[no_answer]
            if not correct[i] and not math.isnan(shaped[i]) and key is not None:
                keys[i] = key
        sizes, n = Counter(keys.values()), len(keys)
        if n <= 1:
            continue
        scale = sum(abs(advantages[i]) for i in keys) / n
        entropy = -sum(size / n * math.log(size / n) for size in sizes.values())
        for i, key in keys.items():
            tilt = alpha * (-math.log(sizes[key] / n) - entropy) / math.log(n)
            delta = scale * (-beta if len(sizes) == 1 else tilt)
            shaped[i] = advantages[i] + math.copysign(min(abs(delta), abs(advantages[i]) / kappa), delta)
    return shaped


@st.composite
def batches(draw, min_group=1):
    group_size = draw(st.integers(min_group, 10))
    n = group_size * draw(st.integers(1, 3))
    correct = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    answers = draw(st.lists(st.sampled_from(["a", "A ", "b", "c", "d", "", " ", None, "e"]), min_size=n, max_size=n))
    values = st.floats(-3, 3, width=32, allow_subnormal=False)
    advantages = draw(st.lists(st.one_of(values, st.just(math.nan)), min_size=n, max_size=n))
    return torch.tensor(advantages, dtype=torch.float64), group_size, correct, answers


strengths = st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(1.1, 5), st.sampled_from(NO_ANSWER))


@given(batches(), strengths)
def test_equals_the_definition_and_stays_in_bounds(batch, strength):
    advantages, group_size, correct, answers = batch
    alpha, beta, kappa, no_answer = strength
    shaped = edas(advantages, group_size, correct, answers, alpha, beta, kappa, no_answer)
    expected = reference(advantages.tolist(), group_size, correct, answers, *strength)
    assert_close(shaped, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0, equal_nan=True)

    right = torch.tensor(correct)
    assert torch.equal(shaped[right].nan_to_num(9), advantages[right].nan_to_num(9))
    scored = ~advantages.isnan()
    assert torch.equal(shaped[scored].sign(), advantages[scored].sign())
    moved = (shaped - advantages).abs()[scored]
    assert (moved <= advantages.abs()[scored] / kappa + 1e-12).all()


@given(batches(), strengths, st.randoms(use_true_random=False))
def test_order_and_labels_do_not_matter(batch, strength, random):
    advantages, group_size, correct, answers = batch
    shaped = edas(advantages, group_size, correct, answers, *strength)

    groups = [list(range(start, start + group_size)) for start in range(0, len(answers), group_size)]
    for group in groups:
        random.shuffle(group)
    random.shuffle(groups)
    order = [i for group in groups for i in group]
    permuted = edas(advantages[order], group_size, [correct[i] for i in order], [answers[i] for i in order], *strength)
    assert_close(permuted, shaped[order], atol=1e-12, rtol=0, equal_nan=True)

    labels = dict(zip("abcde", random.sample("vwxyz", 5), strict=True))
    relabelled = [labels.get((answer or "").strip().lower(), answer) for answer in answers]
    assert_close(edas(advantages, group_size, correct, relabelled, *strength), shaped, equal_nan=True)


@given(batches(), strengths, st.floats(0.01, 100))
def test_scale(batch, strength, factor):
    advantages, *rest = batch
    shaped = edas(advantages, *rest, *strength)
    assert_close(edas(factor * advantages, *rest, *strength), factor * shaped, equal_nan=True)


@given(batches())
def test_no_strength_is_the_identity(batch):
    advantages = batch[0].float()
    shaped = edas(advantages, *batch[1:], alpha=0, beta=0)
    assert torch.equal(shaped.nan_to_num(9), advantages.nan_to_num(9))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 4), st.floats(0.01, 0.5))
def test_binary_rewards(sizes, right, alpha):
    wrong = sum(sizes)
    correct = [True] * right + [False] * wrong
    answers = ["right"] * right + [f"{k:02}" for k, size in enumerate(sizes) for _ in range(size)]
    base = grpo([float(c) for c in correct], len(correct)) if len(correct) > 1 else torch.zeros(1)
    shaped = edas(base, len(correct), correct, answers, alpha=alpha)
    if len(sizes) > 1:  # the tilt is below 1 / kappa: no clip, and the group's mean stays
        assert shaped.sum().item() == pytest.approx(base.sum().item(), abs=1e-5)
    elif wrong > 1:
        assert_close(shaped[right:], 1.3 * base[right:])
    if len(set(sizes)) == 1 and len(sizes) > 1:
        assert torch.equal(shaped, base)
    penalty = -shaped[right:]
    by_size = sorted((size, penalty[sum(sizes[:k])].item()) for k, size in enumerate(sizes))
    assert all(rare <= common + 1e-6 for (_, rare), (_, common) in zip(by_size, by_size[1:], strict=False))


# The shaper.


def context(advantages, group_size, correct, answers, valid=None, local=None, step=0):
    n = len(answers)
    correct = torch.tensor(correct)
    return ShapingContext(
        base=advantages,
        group_size=group_size,
        rewards_per_func=correct.float()[:, None],
        reward_names=["accuracy"],
        valid=torch.ones(n, dtype=torch.bool) if valid is None else torch.tensor(valid),
        correct=correct,
        wrong=~correct,
        answers=answers,
        local=local or slice(None),
        mask=torch.ones(n, 1, dtype=torch.bool),
        step=step,
    )


def test_shaper_equals_the_function_and_counts():
    base = torch.cat([grpo(RIGHT3, 8), grpo(RIGHT3, 8), torch.zeros(8)])
    ctx = context(base, 8, RIGHT3 * 2 + [True] * 8, MIXED + SAME + SAME, local=slice(2, 12))
    shaped = EdasShaper().shape(ctx, base)
    assert torch.equal(shaped.advantages, edas(base, 8, ctx.correct, ctx.answers))
    assert shaped.metrics == {
        "groups_diverse": 1,
        "groups_collapsed": 1,
        "groups_skipped": 1,
        "wrong_per_group": pytest.approx(10 / 3),
        "classes_per_group": pytest.approx(4 / 3),
        "clipped": 0,
        "warmup": 1,
    }
    assert shaped.columns == {"error_class": [None, "7", "7", "7", "12", "", None, None, None, "7"]}


def test_shaper_leaves_unscored_and_undecided_rollouts():
    base = grpo(RIGHT3, 8)
    ctx = context(base, 8, RIGHT3, MIXED, valid=[True] * 7 + [False])
    ctx.wrong[3] = False
    shaped = EdasShaper().shape(ctx, base)
    assert shaped.columns["error_class"] == [None] * 4 + ["7", "7", "12", None]
    assert torch.equal(shaped.advantages[[3, 7]], base[[3, 7]])
    assert not torch.equal(shaped.advantages[4:7], base[4:7])


def test_wrong_rollouts_of_another_format_keep_their_advantage():
    """As in the authors' code; where the format has no score, they are as wrong as any."""
    base = grpo(RIGHT3, 8)
    ctx = context(base, 8, RIGHT3, MIXED)
    ctx.reward_names, form = ["accuracy", "format"], torch.ones(8)
    form[3], form[4], form[0] = 0.4, torch.nan, 0.0
    ctx.rewards_per_func = torch.stack([ctx.correct.float(), form], 1)
    shaper = EdasShaper(format_reward="format")
    assert shaper.requires.rewards == ("format",)
    shaped = shaper.shape(ctx, base)
    assert shaped.columns["error_class"] == [None] * 4 + ["7", "7", "12", ""]
    assert torch.equal(shaped.advantages, edas(base, 8, [*RIGHT3[:3], True, *RIGHT3[4:]], MIXED))
    form[3] = 0.5
    ctx.rewards_per_func = torch.stack([ctx.correct.float(), form], 1)
    assert torch.equal(shaper.shape(ctx, base).advantages, edas(base, 8, RIGHT3, MIXED))


def test_answers_may_be_numbers():
    base = grpo(RIGHT3, 8)
    given = [None if text == "" else int(text) - 7 for text in MIXED]
    assert 0 in given
    assert torch.equal(edas(base, 8, RIGHT3, given), edas(base, 8, RIGHT3, MIXED))


def test_shaper_warms_up():
    base = grpo(RIGHT3, 8)
    shaper = EdasShaper(warmup_start=2, warmup_steps=4)
    assert torch.equal(shaper.shape(context(base, 8, RIGHT3, MIXED, step=2), base).advantages, base)
    half = shaper.shape(context(base, 8, RIGHT3, MIXED, step=4), base)
    assert torch.equal(half.advantages, edas(base, 8, RIGHT3, MIXED, alpha=0.2, beta=0.15))
    assert half.metrics["warmup"] == 0.5


def test_shaper_refuses_bad_parameters_at_once():
    with pytest.raises(ValueError, match="kappa > 1"):
        EdasShaper(kappa=1)
    with pytest.raises(ValueError, match="no_answer"):
        EdasShaper(no_answer="drop")


def test_edas_costs_little_processor_time(one_thread):
    rollouts, group_size = 4096, 16
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(6, (rollouts,), generator=generator)
    correct, answers = answers == 0, [f"{answer} apples" for answer in answers.tolist()]
    base = grpo(correct.tolist(), group_size)
    times = []
    for _ in range(5):
        start = time.process_time()
        edas(base, group_size, correct, answers)
        times.append(time.process_time() - start)
    assert min(times) < 0.02  # about 2 ms
