import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_rb.advantages import (
    CalibAdvShaper,
    EdasShaper,
    Requires,
    SequenceShaper,
    Shaped,
    ShapingContext,
    SrarShaper,
    TokenShaper,
    build_shapers,
    check_shapers,
    run_pipeline,
)
from hf_rb.methods import registry


class Halve(SequenceShaper):
    name = "halve"
    requires = Requires(correct=True)

    def shape(self, ctx, advantages):
        shaped = torch.where(ctx.correct, advantages, advantages / 2)
        return Shaped(shaped, {"calls": 1.0}, {"right": ctx.correct[ctx.local].tolist()})


class Shift(TokenShaper):
    name = "shift"
    additive = True

    def shape(self, ctx, advantages):
        return Shaped(advantages + 3)


class Double(TokenShaper):
    name = "double"

    def shape(self, ctx, advantages):
        return Shaped(2 * advantages)


def context(**fields):
    given = {
        "base": torch.tensor([1.0, -1.0, 0.5, 0.0]),
        "group_size": 2,
        "rewards_per_func": torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, torch.nan], [torch.nan] * 2]),
        "reward_names": ["accuracy", "format"],
        "valid": torch.tensor([True, True, True, False]),
        "correct": torch.tensor([True, False, False, False]),
        "mask": torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool),
    }
    return ShapingContext(**{**given, **fields})


def test_sequence_shapers_keep_one_advantage_a_rollout():
    advantages, metrics, columns = run_pipeline(context(), [Halve()])
    assert torch.equal(advantages, torch.tensor([1.0, -0.5, 0.25, 0.0]))
    assert columns == {"right": [True, False, False, False], "shaped_advantage": [1.0, -0.5, 0.25, 0.0]}
    assert metrics == {
        "shaping/halve/mean": pytest.approx(0.25),  # over the three scored rollouts
        "shaping/halve/std": pytest.approx(torch.tensor([1.0, -0.5, 0.25]).std(correction=0).item()),
        "shaping/halve/changed": pytest.approx(2 / 3),
        "shaping/halve/delta_abs": pytest.approx(0.25),
        "shaping/halve/flipped": 0,
        "shaping/halve/calls": 1.0,
    }


def test_token_shapers_run_on_the_tokens_of_the_loss():
    ctx = context()
    advantages, metrics, columns = run_pipeline(ctx, [Halve(), Double(), Shift()])
    assert torch.equal(advantages, torch.tensor([[5.0, 5, 0], [2, 0, 2], [0, 0, 0], [0, 0, 0]]))
    assert torch.equal(ctx.sequence_advantages, torch.tensor([1.0, -0.5, 0.25, 0.0]))
    assert columns["shaped_advantage"] == [5.0, 2.0, 0.0, 0.0]  # the last one is not scored, the third has no tokens
    assert metrics["shaping/shift/mean"] == 3.5
    assert metrics["shaping/shift/flipped"] == 0.5
    assert metrics["shaping/double/delta_abs"] == pytest.approx((2 * 1 + 2 * 0.5) / 4)


def test_this_process_gets_its_rows():
    ctx = context(local=slice(1, 3), mask=context().mask[1:3])
    assert torch.equal(run_pipeline(ctx, [Halve()])[0], torch.tensor([-0.5, 0.25]))
    tokens, _, columns = run_pipeline(ctx, [Halve(), Shift()])
    assert torch.equal(tokens, torch.tensor([[2.5, 0, 2.5], [0, 0, 0]]))
    assert columns["shaped_advantage"] == [2.5, 0.0]


def test_no_shaper_is_the_base():
    ctx = context(local=slice(0, 2), mask=context().mask[:2])
    advantages, metrics, columns = run_pipeline(ctx, [])
    assert torch.equal(advantages, ctx.base[:2]) and not metrics
    assert columns == {"shaped_advantage": [1.0, -1.0]}


def test_input_is_not_written_to():
    ctx = context()
    run_pipeline(ctx, [Halve(), Double(), Shift()])
    assert torch.equal(ctx.base, context().base)


class Broken(SequenceShaper):
    name = "broken"

    def __init__(self, made):
        self.made = made

    def shape(self, ctx, advantages):
        return self.made


@pytest.mark.parametrize(
    "made, message",
    [
        (Shaped(torch.zeros(3)), r"shape \(4,\) and returned \(3,\)"),
        (Shaped(torch.full((4,), torch.nan)), "not finite"),
    ],
)
def test_a_broken_shaper_is_named(made, message):
    with pytest.raises(ValueError, match=f"'broken'.*{message}"):
        run_pipeline(context(), [Broken(made)])


def test_a_column_of_all_rollouts_is_refused():
    ctx = context(local=slice(0, 2), mask=context().mask[:2])
    shaper = Broken(Shaped(ctx.base, columns={"answer": ctx.base.tolist()}))
    with pytest.raises(
        ValueError, match=r"'answer' of the advantage shaper 'broken' has 4 entries.*2 rollouts.*ctx.local"
    ):
        run_pipeline(ctx, [shaper])


@pytest.mark.parametrize("given", [Halve, "edas", SimpleNamespace(name="x", shape=None)])
def test_what_is_not_a_shaper(given):
    with pytest.raises(TypeError, match="derives from `SequenceShaper` or `TokenShaper`"):
        check_shapers([given], [], [], True)


def test_rewards_by_name():
    assert torch.equal(context().reward("accuracy")[:3], torch.tensor([1.0, 0.0, 0.5]))
    with pytest.raises(ValueError, match="'f1'.*'accuracy', 'format'"):
        context().reward("f1")


# What is refused before training.


class Needy(SequenceShaper):
    name = "needy"
    requires = Requires(columns=("rubric", "prompt"), rewards=("f1",))

    def shape(self, ctx, advantages):
        return Shaped(advantages)


class Seeing(SequenceShaper):
    name = "seeing"
    requires = Requires(tools=True, one_reward=True)

    def shape(self, ctx, advantages):
        return Shaped(advantages)


@pytest.mark.parametrize(
    "shapers, columns, rewards, has_correct, message",
    [
        (
            [Needy()],
            ["prompt", "answer"],
            ["f1"],
            True,
            "'needy' needs the dataset column 'rubric'.*'prompt', 'answer'",
        ),
        ([Needy()], ["prompt", "rubric"], ["accuracy"], True, "'needy' needs the reward function 'f1'.*'accuracy'"),
        ([Halve()], [], ["accuracy"], False, "'halve'.*Set `correct_reward`.*'accuracy'"),
        ([Halve(), Halve()], [], [], True, "'halve' is listed more than once"),
        ([Shift(), Double()], [], [], True, r"Write `advantage_shapers: \[double, shift\]`"),
        (
            [Seeing()],
            [],
            ["f1"],
            True,
            "'seeing' reads what tools return, and there are none. Set `environment: search`",
        ),
        (
            [Seeing()],
            [],
            ["f1", "form"],
            True,
            "needs to know which reward is meant.*Set `correct_reward` to one of 'f1', 'form'",
        ),
        ([Shift(), Halve()], [], [], True, r"Write `advantage_shapers: \[halve, shift\]`"),
    ],
)
def test_refusals(shapers, columns, rewards, has_correct, message):
    with pytest.raises(ValueError, match=message):
        check_shapers(shapers, columns, rewards, has_correct, has_tools=False)


def test_orders_that_may_run():
    check_shapers([Needy(), Halve(), Double(), Shift()], ["rubric", "prompt"], ["f1"], True)
    edas, calibadv, srar = EdasShaper(), CalibAdvShaper(soft=False), SrarShaper(lambda requests: [])
    check_shapers([edas, calibadv, srar], ["rubric"], ["accuracy"], True)
    with pytest.raises(ValueError, match=r"\[calibadv, srar\]"):
        check_shapers([srar, calibadv], ["rubric"], ["accuracy"], True)


# The registry.

ARGS = SimpleNamespace(
    edas_alpha=0.1,
    edas_beta=0.2,
    edas_kappa=3.0,
    edas_no_answer="skip",
    edas_warmup_start=4,
    edas_warmup_steps=5,
    edas_format_reward="form",
    calibadv_soft=True,
    calibadv_pos_neg_ratio=0.5,
    calibadv_max_gain=10.0,
    calibadv_answer_must_not_call_tool=False,
    calibadv_weighting="loss",
    loss_type="grpo",
    srar_coef=0.3,
    srar_gk="paper",
    srar_ddof=0,
    srar_eps=1e-6,
    srar_only_mixed=False,
    srar_step_pattern=None,
)
TRAINER = SimpleNamespace(answers_equivalent=str.__eq__, step_scorer=lambda ctx: [], judge=lambda requests: [])


def test_built_in_shapers_read_their_fields():
    edas, calibadv, srar = build_shapers(["edas", "calibadv", "srar"], ARGS, TRAINER)
    assert vars(edas) == {
        "alpha": 0.1,
        "beta": 0.2,
        "kappa": 3.0,
        "no_answer": "skip",
        "equivalent": TRAINER.answers_equivalent,
        "warmup_start": 4,
        "warmup_steps": 5,
        "format_reward": "form",
        "requires": Requires(correct=True, answers=True, rewards=("form",)),
    }
    assert (calibadv.step_scorer, calibadv.soft, calibadv.pos_neg_ratio) == (TRAINER.step_scorer, True, 0.5)
    assert (calibadv.max_gain, calibadv.answer_must_not_call_tool, calibadv.sequence_mean) == (10.0, False, True)
    ARGS.loss_type = "dapo"
    assert not build_shapers(["calibadv"], ARGS, TRAINER)[0].sequence_mean
    assert (srar.judge, srar.coef, srar.gk, srar.ddof, srar.only_mixed) == (TRAINER.judge, 0.3, "paper", 0, False)
    assert srar.eps == 1e-6


def test_unknown_name():
    with pytest.raises(ValueError, match="cannot be 'eads'; did you mean 'edas'"):
        build_shapers(["eads"], ARGS, TRAINER)


@pytest.mark.parametrize("where", ["shutil:copy", "collections:Counter"])
def test_a_name_of_something_else_is_no_shaper(monkeypatch, where):
    monkeypatch.setattr(registry, "LOCAL", {where})
    with pytest.raises(ValueError, match=f"'{where}', which cannot be used: .*`{where.partition(':')[2]}`"):
        build_shapers([where], ARGS, TRAINER)


# Two processes give what one gives, groups that straddle them included.


class Processes:
    """`gather` of two processes, played by two threads."""

    def __init__(self):
        self.given, self.barrier = [None, None], threading.Barrier(2, timeout=60)

    def gather_of(self, rank):
        def gather(values):
            self.given[rank] = values
            self.barrier.wait()
            together = [value for values in self.given for value in values]
            self.barrier.wait()
            return together

        return gather


class Letters:
    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


RUNS = [[3, 2], [4], [2, 2], [5, 1], [2], [3, 3]]
STEP_QUALITY = [[1.0], [], [0.5], [1.0], [], [0.0]]
TEXT = "### Step 1: a\n### Step 2: b"


def judge(requests):
    return [[{"id": 1, "satisfied": int(request.prompt) % 2 == 0, "step": 1}] for request in requests]


def one_process(part, gather=list):
    correct = torch.tensor([True, False, False, False, True, False])
    base = torch.tensor([1.1547, -0.57735, -0.57735, -0.57735, 1.1547, -0.57735])
    mask = torch.zeros(6, len(TEXT) + 5, dtype=torch.bool)
    for i, run in enumerate(RUNS):
        mask[i, : run[0]] = True
        mask[i, run[0] + 2 : run[0] + 2 + sum(run[1:])] = True
    ctx = ShapingContext(
        base=base,
        group_size=3,
        rewards_per_func=correct.float()[:, None],
        reward_names=["accuracy"],
        valid=torch.tensor([True] * 5 + [False]),
        correct=correct,
        wrong=~correct,
        answers=["1", "7", "7.0", "7", "1", "8"],
        local=part,
        rows=[{"rubric": "<SUGGEST> a"}] * (part.stop - part.start),
        prompts=[str(i) for i in range(6)][part],
        completions=[TEXT] * (part.stop - part.start),
        completion_ids=[list(map(ord, TEXT))] * (part.stop - part.start),
        mask=mask[part],
        processing_class=Letters(),
        gather=gather,
    )
    compared = []

    def same_digit(first, second):
        compared.append((first, second))
        return first[0] == second[0]

    scorer = CalibAdvShaper(lambda ctx: STEP_QUALITY[ctx.local])
    results = run_pipeline(ctx, [EdasShaper(equivalent=same_digit), scorer, SrarShaper(judge, gk="paper")])
    return *results, compared


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 5))
def test_two_processes_are_one(cut):
    advantages, metrics, columns, compared = one_process(slice(0, 6))
    parts, processes = [slice(0, cut), slice(cut, 6)], Processes()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: one_process(parts[rank], processes.gather_of(rank)), (0, 1)))
    assert_close(torch.cat([result[0] for result in results]), advantages, atol=0, rtol=0)
    for _, own, _, _ in results:
        assert own == pytest.approx(metrics)
    for name, values in columns.items():
        assert [value for _, _, own, _ in results for value in own[name]] == values
    # No pair of answers is compared on two processes.
    assert sorted(pair for *_, own in results for pair in own) == sorted(compared) != []


def test_the_three_papers_act_together():
    advantages, metrics, columns, _ = one_process(slice(0, 6))
    for name in ("edas", "calibadv", "srar"):
        assert metrics[f"shaping/{name}/delta_abs"] > 0
    assert set(columns) == {"error_class", "step_quality", "step_offsets", "shaped_advantage"}
    assert (advantages[5] == 0).all()  # not scored
