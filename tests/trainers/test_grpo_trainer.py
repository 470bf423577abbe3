import functools
import json
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset
from helpers.plugins import install
from peft import PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb import GRPOConfig, GRPOTrainer
from hf_rb.advantages import EdasShaper, Requires, SequenceShaper, Shaped, TokenShaper, edas, srar_offsets
from hf_rb.objectives.hidden_align import hidden_align
from hf_rb.rl import answers
from hf_rb.rl.rewards import EXTRACTORS, answer_format_reward, exact_answer_reward, math_accuracy_reward
from hf_rb.trainers.grpo.hidden_align import anchor_of
from hf_rb.trainers.grpo.shaping import names_of_rewards


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
EDAS = {"advantage_shapers": ["edas"], "correct_reward": "exact_answer_reward"}
CALIBADV = {"advantage_shapers": ["calibadv"]}
# Two right, four wrong with three errors; two of these without an answer.
TEXTS = ["12 + 4 = 16. #### 7", "Now #### 7", "So 9 #### 8", "Then 12 #### 8", "First 4 #### 9", "Next 3 + 2"]
EXACT = functools.partial(exact_answer_reward, answer_extractor=EXTRACTORS["hashes"])


class Injected(GRPOTrainer):
    """Takes given texts in place of sampling any; a text that ends in `…` is cut off there."""

    texts = TEXTS

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations):
        texts = [self.texts[row % num_generations % len(self.texts)] for row in range(len(prompt_ids))]
        ids = [self.processing_class(text.removesuffix("…"))["input_ids"] for text in texts]
        end = [self.processing_class.eos_token_id]
        return [one if text.endswith("…") else one + end for one, text in zip(ids, texts, strict=True)], None


class Same(TokenShaper):
    """The advantage of a completion, for each of its tokens."""

    name = "same"

    def shape(self, ctx, advantages):
        return Shaped(advantages)


class Halve(SequenceShaper):
    name = "halve"
    requires = Requires(correct=True)

    def shape(self, ctx, advantages):
        return Shaped(torch.where(ctx.correct, advantages, advantages / 2))


@pytest.fixture(scope="module")
def data():
    questions = ["How much is 3 + 4?", "What is 9 - 2?", "Half of 14?", "The sum of 5 and 2?"]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": one}], "answer": "7"} for one in questions])


@pytest.fixture
def make(student, data, config):
    def make(flags=EDAS, reward_funcs=EXACT, trainer=Injected, dataset=data, texts=TEXTS, model=student, **kwargs):
        given = {
            "num_generations": 6,
            "per_device_train_batch_size": 12,
            "max_completion_length": 32,
            "shuffle_dataset": False,
            "answer_extractor": "hashes",
            "num_completions_to_print": 1,
        }
        args = GRPOConfig(**{**config, **given, **flags})
        made = trainer(str(model), reward_funcs, args, dataset, **kwargs)
        made.texts = texts
        return made

    return make


def generate(trainer):
    """One generation, as training makes it, in the order of the prompts."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def logged(trainer):
    return trainer.state.log_history[0]


# What reaches the loss


def test_edas_reaches_the_loss_as_the_formula_says(make):
    trainer, plain = make(), make({})
    base = generate(plain)["advantages"]
    answers = [EXTRACTORS["hashes"](text) for text in TEXTS] * 2
    expected = edas(base, 6, [answer == "7" for answer in answers], answers)
    shaped = generate(trainer)["advantages"]
    torch.testing.assert_close(shaped, expected, rtol=1e-6, atol=1e-6)
    assert (shaped != base).sum() == 8


def test_token_advantages_are_zero_outside_the_loss(make):
    trainer = make({}, shapers=[Same()])
    output = generate(trainer)
    base = generate(make({}))["advantages"]
    mask = output["completion_mask"]
    assert output["advantages"].shape == mask.shape
    torch.testing.assert_close(output["advantages"], base[:, None] * mask, rtol=0, atol=0)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type(make, loss_type):
    """Shapers act; and one advantage for each token, all the same, is the loss of one for each completion."""
    losses = {}
    for name, flags, shapers in (
        ("trl", {}, None),
        ("same", {}, [Same()]),
        ("edas", EDAS, None),
        ("edas, tokens", {"correct_reward": "exact_answer_reward"}, [EdasShaper(), Same()]),
    ):
        # Two steps for one generation: with the first alone every ratio is 1.
        once = {"max_steps": 2, "num_iterations": 2, "optim": "sgd", "learning_rate": 1.0, "loss_type": loss_type}
        trainer = make({**once, **flags}, shapers=shapers)
        trainer.train()
        losses[name] = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history[:2]]
    for one, other in (("trl", "same"), ("edas", "edas, tokens")):
        for pair, expected in zip(losses[one], losses[other], strict=True):
            assert pair == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert losses["edas"][0][1] != pytest.approx(losses["trl"][0][1], rel=1e-3)


def test_truncated_completions(make):
    """They leave the loss; to EDAS they are wrong without an answer, or nothing at all."""
    texts = [*TEXTS[:5], "Next 3 + …"]
    flags = {**EDAS, "mask_truncated_completions": True}
    outputs = {rule: generate(make({**flags, "edas_no_answer": rule}, texts=texts)) for rule in ("cluster", "skip")}
    base = generate(make({"mask_truncated_completions": True}, texts=texts))["advantages"]
    for output in outputs.values():
        assert not output["completion_mask"][5].any()
    assert outputs["skip"]["advantages"][5] == base[5]
    assert outputs["cluster"]["advantages"][5] != base[5]


def test_empty_completions_and_no_answers(make, caplog):
    trainer = make(texts=[""])
    output = generate(trainer)
    assert output["completion_mask"].sum(1).tolist() == [1] * 12  # the end of the text
    assert output["advantages"].tolist() == [0.0] * 12
    assert "No completion of step 0 has an answer" in caplog.text
    assert trainer._metrics["train"]["shaping/answered"] == [0.0]


# Rewards that are not there


def test_completions_that_nothing_has_scored(make):
    """Their advantage is 0, and EDAS does not count them."""

    def exact_answer_reward(completions, answer, **kwargs):
        scores = EXACT(completions, answer)
        return [None if index % 6 == 3 else score for index, score in enumerate(scores)]

    output = generate(make(reward_funcs=exact_answer_reward))
    base = generate(make({}, reward_funcs=exact_answer_reward))["advantages"]
    assert output["advantages"][3] == base[3] == 0
    answers, correct = ["7", "7", "8", "9", None], [True, True, False, False, False]
    rest = [0, 1, 2, 4, 5]
    torch.testing.assert_close(output["advantages"][rest], edas(base[rest], 5, correct, answers))


def test_nothing_is_scored_at_all(make):
    def exact_answer_reward(completions, **kwargs):
        return [None] * len(completions)

    trainer = make(reward_funcs=exact_answer_reward)
    trainer.train()
    assert logged(trainer)["grad_norm"] == 0
    assert logged(trainer)["shaping/edas/changed"] == 0


def test_correct_is_unknown_and_another_reward_is_not(make):
    """A completion that `correct_reward` leaves out is neither right nor wrong, and keeps its advantage."""

    def unsure(completions, answer, **kwargs):
        scores = EXACT(completions, answer)
        return [None if index % 6 == 4 else score for index, score in enumerate(scores)]

    flags = {**EDAS, "correct_reward": "unsure"}
    output = generate(make(flags, reward_funcs=[EXACT, unsure]))
    base = generate(make({}, reward_funcs=[EXACT, unsure]))["advantages"]
    assert output["advantages"][4] == base[4] != 0
    assert output["advantages"][3] != base[3]


def test_the_threshold(make):
    def partial(completions, **kwargs):
        return [[1.0, 0.4, 0.2, 0.2, 0.1, 0.0][index % 6] for index in range(len(completions))]

    changed = {}
    for threshold in (0.5, 0.4, 0.05):
        flags = {**EDAS, "correct_reward": "partial", "correct_threshold": threshold}
        base = generate(make({}, reward_funcs=partial))["advantages"]
        changed[threshold] = (generate(make(flags, reward_funcs=partial))["advantages"] != base)[:6].tolist()
    assert changed[0.5] == [False, True, True, True, True, True]
    assert changed[0.4] == [False, False, True, True, True, True]
    assert changed[0.05] == [False] * 6  # one wrong completion has no other to be compared with


# The table and the logs


def tables(trainer):
    """The tables of completions, by step, with `None` where there is nothing."""
    files = sorted(Path(trainer.args.output_dir, "completions").glob("*"))
    return [table.astype(object).where(table.notna(), None) for table in map(pandas.read_parquet, files)]


def test_the_table_of_completions(make):
    trainer = make({**EDAS, "log_completions": True, "max_steps": 1})
    trainer.train()
    table = tables(trainer)[0]
    assert len(table) == 12
    assert table["error_class"].tolist() == [None, None, "8", "8", "9", ""] * 2
    correct = [score == 1 for score in table["exact_answer_reward"]]
    base, shaped = (torch.tensor(table[name].tolist()) for name in ("advantage", "shaped_advantage"))
    torch.testing.assert_close(shaped, edas(base, 6, correct, ["7", "7", "8", "8", "9", None] * 2))
    assert (shaped != base).sum() == 8
    log = logged(trainer)
    assert log["shaping/answered"] == pytest.approx(5 / 6)
    assert log["shaping/edas/groups_diverse"] == 2
    assert log["shaping/edas/changed"] == pytest.approx(8 / 12)


def test_the_table_of_a_token_shaper_has_means(make):
    trainer = make({"log_completions": True, "max_steps": 1}, shapers=[Same()])
    trainer.train()
    table = tables(trainer)[0]
    assert table["shaped_advantage"].tolist() == pytest.approx(table["advantage"].tolist(), abs=1e-6)


@pytest.mark.parametrize("generations, batch", [(6, 6), (3, 6), (1, 4)])
def test_evaluation(make, data, generations, batch):
    """Before, between and after training steps, in batches of its own; of one completion a prompt, nothing is shaped."""
    flags = {
        **EDAS,
        "log_completions": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "num_generations_eval": generations,
        "per_device_eval_batch_size": batch,
    }
    trainer = make(flags, eval_dataset=data)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3
    assert ("eval_shaping/edas/mean" in evaluations[0]) == (generations > 1)
    assert evaluations[0]["eval_shaping/answered"] > 0
    trainer.evaluate()
    table = tables(trainer)[-1]
    if generations == 1:
        assert table["shaped_advantage"].tolist()[-4:] == [None] * 4
    else:
        assert None not in table["shaped_advantage"].tolist()


def test_a_column_that_comes_late(make, data):
    """In an evaluation of several generations, of which the first lacks it."""

    class Late(Same):
        seen = 0

        def shape(self, ctx, advantages):
            self.seen += 1
            return Shaped(advantages, columns={"late": [self.seen] * len(advantages)} if self.seen == 2 else {})

    flags = {"log_completions": True, "per_device_eval_batch_size": 6, "eval_strategy": "steps", "eval_steps": 9}
    trainer = make(flags, eval_dataset=data.select(range(2)), shapers=[Late()])
    trainer.evaluate()
    assert tables(trainer)[-1]["late"].tolist() == [None] * 6 + [2] * 6


def test_the_pipeline_is_printed(make, capsys):
    make({**EDAS, "hidden_align_coef": 0.1}).train()
    assert (
        "advantages: GRPO over groups of 6 -> edas (alpha 0.4, beta 0.3, kappa 2.0, no_answer cluster, equivalence auto, "
        "warmup_start 0, warmup_steps 0) -> dapo loss + 0.1 hidden-align\n"
    ) in capsys.readouterr().out


def test_of_objects_the_pipeline_has_the_names(make, capsys):
    """Not what the config says of shapers that they replace."""
    make(EDAS, shapers=[EdasShaper(alpha=0.1), Same()]).train()
    assert "advantages: GRPO over groups of 6 -> edas -> same -> dapo loss\n" in capsys.readouterr().out


def test_warmup(make):
    trainer = make({**EDAS, "edas_warmup_start": 1, "edas_warmup_steps": 2, "max_steps": 3})
    trainer.train()
    changes = [entry["shaping/edas/delta_abs"] for entry in trainer.state.log_history[:3]]
    assert changes[0] == changes[1] == 0 < changes[2]


# Shapers of one's own


def test_objects_win_over_the_config(make):
    trainer = make(EDAS, shapers=[Halve()])
    base = generate(make({}))["advantages"]
    correct = torch.tensor([True, True, False, False, False, False] * 2)
    torch.testing.assert_close(generate(trainer)["advantages"], torch.where(correct, base, base / 2))
    assert generate(make(EDAS, shapers=[]))["advantages"].tolist() == base.tolist()


def test_an_installed_package_registers_one(make, monkeypatch, tmp_path):
    code = f"from hf_rb.methods import ShaperMethod\nfrom {__name__} import Halve as Base\n\n"
    code += "class Halved(Base):\n    method = ShaperMethod(key='halved', name='Halved', summary='Halves.')\n"
    install(monkeypatch, tmp_path / "site", "halving", code, shaper={"halved": "Halved"})
    trainer = make({**EDAS, "advantage_shapers": ["edas", "halved"]})
    assert [shaper.name for shaper in trainer.shapers] == ["edas", "halved"]


def test_an_extractor_of_ones_own(make):
    trainer = make(answer_extractor=lambda text: text.split()[0])
    output = generate(trainer)
    base = generate(make({}))["advantages"]
    answers = [text.split()[0] for text in TEXTS] * 2
    torch.testing.assert_close(
        output["advantages"], edas(base, 6, [True, True, False, False, False, False] * 2, answers)
    )


def test_answers_by_math_verify(make):
    pytest.importorskip("math_verify")
    texts = ["#### 7", "#### 7.0", "#### 0.5", "#### 1/2", "#### \\frac{1}{2}", "#### 3"]
    by_text, by_math, by_default = (
        generate(make({**EDAS, **kind}, texts=texts))["advantages"]
        for kind in ({"edas_equivalence": "string"}, {"edas_equivalence": "math"}, {})
    )
    base = generate(make({}, texts=texts))["advantages"]
    torch.testing.assert_close(by_text[2:6], base[2:6])  # four errors, all equally rare
    same = [True, True, *[False] * 4] * 2
    torch.testing.assert_close(by_math, edas(base, 6, same, ["7", "7", "h", "h", "h", "3"] * 2))
    assert torch.equal(by_default, by_math)


def test_numbers_are_one_error_however_they_are_written(make, monkeypatch):
    """Without math-verify too, and right where evaluation counts them as right."""
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    texts = ["#### 7.00", "#### $7", "#### 1,080", "#### 1080", "#### 1/2", "#### 0.5"]
    shaped = generate(make(texts=texts))["advantages"]
    base = generate(make({}, texts=texts))["advantages"]
    assert (base[:2] > 0).all() and (base[2:6] < 0).all()
    torch.testing.assert_close(
        shaped, edas(base, 6, [True] * 2 + [False] * 4 + [True] * 2 + [False] * 4, list("77aabc") * 2)
    )


def test_names_of_rewards():
    """As TRL will give them."""

    class Scorer:
        def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

    assert names_of_rewards([EXACT, Scorer(), "org/reward-model"]) == ["exact_answer_reward", "Scorer", "reward-model"]
    assert names_of_rewards(EXACT) == ["exact_answer_reward"]
    assert names_of_rewards(None) == []


def test_a_streamed_dataset(make, data):
    trainer = make(dataset=data.to_iterable_dataset())
    trainer.train()
    assert logged(trainer)["shaping/edas/changed"] > 0
    with pytest.raises(ValueError, match="needs the dataset column 'rubric'"):
        make({}, dataset=data.to_iterable_dataset(), shapers=[NeedsRubric()])


# What cannot run is refused before a model is loaded


class NeedsRubric(SequenceShaper):
    name = "needs"
    requires = Requires(columns=("rubric",))

    def shape(self, ctx, advantages):
        return Shaped(advantages * torch.tensor([row["rubric"] for row in ctx.rows]))


@pytest.mark.parametrize(
    "flags, kwargs, message",
    [
        (
            {"correct_reward": "accuracy"},
            {},
            "`correct_reward: accuracy` is none of the reward functions, exact_answer_reward",
        ),
        ({}, {"shapers": [Halve()]}, "'halve' needs to know which completions are correct. Set `correct_reward`"),
        ({}, {"shapers": [NeedsRubric()]}, "'needs' needs the dataset column 'rubric', and the columns are"),
        (EDAS, {"shapers": [Same(), EdasShaper()]}, r"Write `advantage_shapers: \[edas, same\]`"),
        (EDAS, {"shapers": [EdasShaper(), EdasShaper()]}, "'edas' is listed more than once"),
        ({**EDAS, "edas_format_reward": "form"}, {}, "'edas' needs the reward function 'form'"),
        ({"advantage_shapers": ["calibadv"]}, {}, "'calibadv' reads what tools return, and there are none"),
        (
            {"advantage_shapers": ["calibadv"]},
            {"rollout_func": lambda prompts, trainer: {}},
            "name it as `calibadv_step_field`",
        ),
        (
            {"advantage_shapers": ["calibadv"]},
            {"reward_funcs": [EXACT, answer_format_reward], "tools": [max]},
            "Set `correct_reward` to one of 'exact_answer_reward', 'answer_format_reward'",
        ),
        (
            {"advantage_shapers": ["calibadv"], "calibadv_step_field": "scores"},
            {},
            "'calibadv' needs the dataset column 'scores'",
        ),
        (
            {"correct_reward": "x"},
            {"reward_funcs": None},
            "`correct_reward: x` names no reward function, because none was given",
        ),
        (
            {"hidden_align_coef": 0.1, "correct_reward": "exact_answer_reward"},
            {"answer_extractor": str.strip},
            "Set `hidden_align_marker`",
        ),
    ],
)
def test_refused(make, flags, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(flags, model="there/is/no/model", **kwargs)


def test_a_column_missing_in_evaluation_only(make, data):
    rich = data.add_column("rubric", [1.0] * len(data))
    with pytest.raises(ValueError, match="needs the dataset column 'rubric'"):
        make({}, dataset=rich, eval_dataset={"some": data}, shapers=[NeedsRubric()], model="there/is/no/model")
    make({}, dataset=rich, eval_dataset={"some": rich}, shapers=[NeedsRubric()])


def test_a_rubric_that_cannot_be_read(make, data):
    flags = {"advantage_shapers": ["srar"], "correct_reward": "exact_answer_reward", "srar_judge": "tiny"}
    bad = data.add_column("rubric", ["<SUGGEST> adds"] * 3 + ["adds"])
    with pytest.raises(ValueError, match="Row 3 of the column `rubric`"):
        make(flags, dataset=bad, model="there/is/no/model")


@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize("reward, column", [(EXACT, "answer"), (math_accuracy_reward, "solution")])
def test_lists_of_right_answers(make, data, reward, column, streamed):
    """Not at the first reward."""
    lists = data.remove_columns("answer").add_column(column, [["7", "seven"]] * len(data))
    lists = lists.to_iterable_dataset() if streamed else lists
    message = f"The column `{column}` of the dataset has no answers to compare with. An answer is text or a number, and .*Write one"
    for keys in ({"dataset": lists}, {"eval_dataset": {"some": lists}}):
        with pytest.raises(ValueError, match=message):
            make({}, reward, model="there/is/no/model", **keys)


def test_a_row_without_a_right_answer_is_not_scored(make, data):
    some = data.remove_columns("answer").add_column("answer", [7.0, None, 7.0, None])
    output = generate(make({}, dataset=some))
    assert output["advantages"][:6].any() and not output["advantages"][6:].any()


@pytest.mark.parametrize("gk", ["code", "paper"])
def test_srar_on_steps_that_do_not_exist(make, data, gk):
    """Rollouts of one step each: what the judge says of a step 9 is compared with that of others (the authors' code), or is step 0."""
    steps, items = [0, 0, 9, 1, -1, 9], [1, 2, 1, 1, 1, 2]
    found = [[{"id": item, "satisfied": True, "step": step}] for step, item in zip(steps, items, strict=True)]
    flags = {"advantage_shapers": ["srar"], "correct_reward": "exact_answer_reward", "srar_gk": gk, "srar_eps": 1e-6}
    rich = data.add_column("rubric", ["<SUGGEST> adds\n<BONUS> is brief"] * len(data))
    output = generate(make(flags, dataset=rich, judge=lambda requests: found * 2))
    base = generate(make({}))["advantages"]
    scores = {"code": [{0: 0.8}, {0: 1.0}, {9: 0.8}, {1: 0.8}, {}, {9: 1.0}]}
    scores["paper"] = [{0: one[9]} if 9 in one else one for one in scores["code"]]
    z = [sum(one.values()) for one in srar_offsets(scores[gk], 6, eps=1e-6)] * 2
    if gk == "code":
        assert z[:6] == pytest.approx([-0.70710, 0.70710, -0.70710, 0, 0, 0.70710], abs=1e-5)
    mask = output["completion_mask"]
    torch.testing.assert_close(output["advantages"], (base + torch.tensor(z))[:, None] * mask, rtol=1e-6, atol=1e-6)


def test_math_equivalence_without_math_verify(make, monkeypatch):
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="`edas_equivalence: math` needs math-verify"):
        make({**EDAS, "edas_equivalence": "math"}, model="there/is/no/model")


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"importance_sampling_level": "sequence"},
            "`importance_sampling_level: sequence` is defined with one advantage",
        ),
        ({"loss_type": "vespo"}, "`loss_type: vespo` is defined with one advantage a completion"),
        ({"off_policy_mask_threshold": 0.1}, "`off_policy_mask_threshold` is defined"),
    ],
)
def test_warnings_about_tokens(make, caplog, flags, message):
    make(flags)
    assert message not in caplog.text
    make(flags, shapers=[Same()])
    assert message in caplog.text


@pytest.mark.parametrize("loss_type, warned", [("grpo", True), ("sapo", True), ("dapo", False)])
def test_warning_about_a_balance_of_tokens(make, caplog, loss_type, warned):
    flags = {**CALIBADV, "calibadv_soft": False, "loss_type": loss_type}
    make(flags)
    assert ("`calibadv_weighting: loss` balances what this loss adds up" in caplog.text) == warned
    caplog.clear()
    make({**flags, "calibadv_weighting": "loss"})
    assert "calibadv_weighting" not in caplog.text


@pytest.mark.parametrize("loss_type, weighting", [("dapo", "token"), ("grpo", "loss")])
def test_answers_are_balanced_in_the_loss(make, loss_type, weighting):
    """What the loss adds up of right and of wrong answers cancels. Of rollouts that are answers only, in a mean of each, it did."""
    flags = {**CALIBADV, "calibadv_soft": False, "loss_type": loss_type, "calibadv_weighting": weighting}
    trainer = make({**flags, "max_steps": 1})
    trainer.train()
    assert (logged(trainer)["shaping/calibadv/delta_abs"] > 0.01) == (loss_type == "dapo")
    assert logged(trainer)["loss"] == pytest.approx(0, abs=1e-6)
    crossed = make({**flags, "max_steps": 1, "calibadv_weighting": "token", "loss_type": "grpo"})
    crossed.train()
    assert abs(logged(crossed)["loss"]) > 1e-3


def test_edas_leaves_out_what_has_no_format(make):
    def form(completions, **kwargs):
        return [0.0 if index % 6 == 3 else 1.0 for index in range(len(completions))]

    flags = {**EDAS, "edas_format_reward": "form", "reward_weights": [1.0, 0.0]}
    output = generate(make(flags, reward_funcs=[EXACT, form]))["advantages"]
    base = generate(make({}))["advantages"]
    answers = [EXTRACTORS["hashes"](text) for text in TEXTS]
    left_out = [True, True, False, True, False, False]
    torch.testing.assert_close(output[:6], edas(base[:6], 6, left_out, answers), rtol=1e-6, atol=1e-6)


# Agents


def test_rollout_func(make, student):
    """With tokens of the environment between those of the policy, and a field that a shaper reads."""

    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        said = ["", " so it is", " and so it is then"]
        texts = [["call 3", " says 4", f"{said[row % 3]} #### {7 if row % 3 else 8}"] for row in range(len(prompts))]
        parts = [[tokenizer(part)["input_ids"] for part in text] for text in texts]
        return {
            "prompt_ids": [tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts],
            "completion_ids": [sum(part, []) for part in parts],
            "logprobs": [[0.0] * len(sum(part, [])) for part in parts],
            "env_mask": [[1] * len(a) + [0] * len(b) + [1] * len(c) for a, b, c in parts],
            "rubric": [float(row % 2) for row in range(len(prompts))],
        }

    trainer = make(
        {"correct_reward": "exact_answer_reward"},
        trainer=GRPOTrainer,
        rollout_func=rollout,
        shapers=[EdasShaper(), NeedsRubric(), Same()],
    )
    output = generate(trainer)
    mask = output["completion_mask"] * output["tool_mask"]
    assert 0 < mask.sum() < output["completion_mask"].sum()
    advantages = output["advantages"]
    assert not advantages[mask == 0].any()
    assert [bool(row.any()) for row in advantages] == [row % 2 == 1 for row in range(12)]
    trainer.train()

    without = make(
        {}, trainer=GRPOTrainer, shapers=[NeedsRubric()], rollout_func=lambda *args: _without(rollout(*args))
    )
    with pytest.raises(ValueError, match="'needs' needs the dataset column 'rubric'"):
        without.train()


def _without(fields):
    return {key: value for key, value in fields.items() if key != "rubric"}


def double(number: int) -> int:
    """
    Doubles a number.

    Args:
        number: The number.
    """
    return 2 * number


class Calling(GRPOTrainer):
    """Every completion calls a tool; then every third answers wrongly, and every sixth not at all."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        call = '<tool_call>\n{"name": "double", "arguments": {"number": 4}}\n</tool_call>'
        texts = []
        for row, prompt in enumerate(prompt_ids):
            if "<tool_response>" not in self.processing_class.decode(prompt):
                texts.append(call)
            else:
                texts.append(["It is then so #### 7", "It is #### 8", "#### 9"][row % 3])
        return [self.processing_class(text + "<|im_end|>")["input_ids"] for text in texts], None


def test_tools(make):
    """The answer is that of the last turn, and what the tool says has no advantage."""
    trainer = make(
        {
            "correct_reward": "exact_answer_reward",
            "max_completion_length": 96,
            "log_completions": True,
            "max_steps": 1,
        },
        trainer=Calling,
        tools=[double],
        shapers=[EdasShaper(), Same()],
    )
    output = generate(trainer)
    mask = output["completion_mask"] * output["tool_mask"]
    spoken = trainer.processing_class.decode(output["completion_ids"][0][mask[0].bool()])
    assert "8" not in spoken and "<tool_call>" in spoken and "#### 7" in spoken
    assert not output["advantages"][mask == 0].any() and output["advantages"][mask == 1].any()
    trainer.train()
    assert tables(trainer)[0]["error_class"].tolist()[:3] == [None, "8", "9"]


# Training


def test_the_checkpoint_has_a_card(make):
    trainer = make({**EDAS, "save_strategy": "steps", "save_steps": 2})
    trainer.train()
    card = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    assert "advantage_shapers" in card and "2605.17333" in card
    assert (
        json.loads(Path(trainer.args.output_dir, "checkpoint-2", "trainer_state.json").read_text())["global_step"] == 2
    )


# Hidden-Align


@pytest.fixture(scope="module")
def tokenizer(student):
    return AutoTokenizer.from_pretrained(student)


@pytest.mark.parametrize(
    "turns, before",
    [
        (["12 + 4 = 16. #### 7"], "12 + 4 = 16."),
        (["#### 5 no #### 7"], "#### 5 no"),
        (["6 so\n#### 7"], None),
        (["#### 7"], ""),
        (["no marker"], ""),
        ([""], ""),
        (["first #### 3", " the tool", " and so #### 7"], "first #### 3 the tool and so"),
        (["first #### 3", " the tool"], "first"),
        (["first", " the tool ####"], ""),
        (["first", " the tool ", "#### 7"], ""),
        (["é ü 語 #### 7"], None),
    ],
)
def test_anchors_are_found_in_turns_of_policy_and_tools(tokenizer, turns, before):
    """Of turns of the policy and, in between, of a tool."""
    parts = [tokenizer(turn)["input_ids"] if turn else [] for turn in turns]
    ids = sum(parts, [])
    mask = [index % 2 == 0 for index, part in enumerate(parts) for _ in part]
    anchor = anchor_of(tokenizer, ids, mask + [False] * 3, "####")
    if before == "":
        assert anchor is None
        return
    text = tokenizer.decode(ids)
    seen = tokenizer.decode(ids[: anchor + 1])
    longer = tokenizer.decode(ids[: anchor + 2])
    assert text.startswith(seen)
    end = text.rfind("####") if before is None else text.index(before) + len(before)
    assert len(seen) <= max(end, text.rfind("####", 0, len(longer) + 8)) and "#### 7" not in seen
    assert mask[anchor]


def test_hidden_align_is_the_loss_on_whole_groups(make, student):
    """The gradient that two shuffled micro-batches bring together is that of the definition, on the model's own states."""
    flags = {"correct_reward": "exact_answer_reward", "hidden_align_coef": 3.0, "beta": 0.0}
    steps = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": 1, "optim": "sgd"}
    rate = {"learning_rate": 0.5, "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}
    texts = ["12 + 4 #### 7", "Now 3 #### 7", "So 9 then #### 7", "12 #### 8", "#### 7", "Next 3 + 2"]
    start = AutoModelForCausalLM.from_pretrained(student)
    moved = {}
    for coef in (3.0, 0.0):
        trainer = make({**flags, **steps, **rate, "hidden_align_coef": coef}, texts=texts)
        trainer.train()
        moved[coef] = {name: part.detach().clone() for name, part in trainer.model.named_parameters()}
    assert logged(trainer).get("hidden_align/aligned") is None

    whole = make({**flags, "per_device_train_batch_size": 12}, texts=texts)
    output = generate(whole)
    ids, mask = (torch.cat([output[f"prompt_{k}"], output[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    states = start.base_model(ids, attention_mask=mask).last_hidden_state[torch.arange(12), output["align_position"]]
    aligned = torch.tensor([True, True, True, False, False, False] * 2)
    (3.0 * hidden_align(states, aligned, 6)).backward()
    for name, part in start.named_parameters():
        difference = (moved[0.0][name] - moved[3.0][name]) / 0.5
        torch.testing.assert_close(difference, part.grad, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("all_correct, aligned", [(False, 0.0), (True, 1.0)])
def test_groups_without_a_wrong_completion(make, all_correct, aligned):
    flags = {
        "correct_reward": "exact_answer_reward",
        "hidden_align_coef": 0.5,
        "hidden_align_all_correct": all_correct,
    }
    trainer = make(flags, texts=["12 + 4 #### 7", "Now 3 #### 7"])
    trainer.train()
    assert logged(trainer)["hidden_align/aligned"] == aligned
    assert ("hidden_align/cosine" in logged(trainer)) == all_correct
    assert (logged(trainer)["grad_norm"] > 0) == all_correct


def test_hidden_align_in_evaluation(make, data):
    flags = {
        "correct_reward": "exact_answer_reward",
        "hidden_align_coef": 0.5,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 12,
    }
    trainer = make(flags, eval_dataset=data)
    trainer.train()
    metrics = trainer.evaluate()
    cosine = trainer.state.log_history[-1]["eval_hidden_align/cosine"]
    assert -1 <= cosine <= 1
    plain = make({**flags, "hidden_align_coef": 0.0}, eval_dataset=data)
    assert metrics["eval_loss"] != plain.evaluate()["eval_loss"]


def test_hidden_align_needs_positions_that_stay(make):
    with pytest.raises(ValueError, match="`hidden_align_coef` does not support prompt-learning adapters"):
        make(
            {"correct_reward": "exact_answer_reward", "hidden_align_coef": 0.5},
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        )
