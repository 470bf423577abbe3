"""
Every trainer with every method through the same checks. Rows follow from the records of methods (`*_cases.py`), so a new method needs
no line here. The fast tests train every row, and every group of rows in every split; the slow ones all the rest.
"""

from collections import Counter
from itertools import permutations
from math import comb

import pytest
import torch
from all_rows import (
    OURS,
    ROWS,
    TRAINERS,
    assert_same_training,
    capture,
    group_of,
    is_fast,
    is_ours,
    named,
    row_of,
    selected,
)
from dense import Dense
from described import STEPS
from helpers.pairwise import cover
from helpers.records import names_of
from helpers.seeded_runs import Runs
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_rb.methods.metrics import SHAPING_METRICS
from hf_rb.methods.registry import catalog
from hf_rb.teachers import CachedTeacher
from hf_rb.tiny import extract_answer


# Splits


def splits():
    keys = [
        (*key, split, path) for key in ROWS for split, path in list(TRAINERS[key[0]].combinations(row_of(key)))[1:]
    ]

    def meetings(key):
        name, row, split, path = key
        kind = "processes" if "processes" in split else "micro-batches" if split[0].isdigit() else split
        return {(name, row), (name, group_of(key), kind), (name, group_of(key), path), (name, split, path)}

    chosen = {*cover([key for key in keys if not row_of(key).minor], meetings)}
    return selected(chosen.__contains__, keys)


@splits()
def test_split_of_a_step_does_not_change_training(trainers, whole, request, key):
    """Nor does the path: padded, padding-free or packed rows, micro-batches, processes, from all logits or in tiles."""
    name, row, split, path = key
    if "2 processes" in split:
        run = request.getfixturevalue("in_two_processes")(key)
    else:
        run = trainers[name].train_row(row_of(key), split, path)
    assert_same_training(trainers[name], run, whole[key[:2]])


def test_both_processes_hear_of_damage(in_two_processes):
    for checkpoint, error in in_two_processes("resume_cases"):  # one process reads the files
        assert checkpoint == "checkpoint-1"
        assert error.startswith("None of the 2 checkpoints")


# Without flags


OFF = [(name, variant) for name, trainer in TRAINERS.items() for variant in trainer.off]


@pytest.fixture(scope="module")
def of_trl(trainers):
    """TRL's trainers, by the names of trainer and variant."""

    def train(key):
        one = trainers[key[0]]
        return one.train(one.parent, one.parent_config, **{"max_steps": 5, **one.off[key[1]]})

    return Runs(train)


@pytest.mark.parametrize("key", OFF, ids="-".join)
def test_flags_off_is_trl_bit_for_bit(trainers, of_trl, key):
    """Where the trainer samples, the random numbers are TRL's too. GKD's loss from all logits is TRL's, beside numbers of ours."""
    one, is_gkd = trainers[key[0]], key[0] == "gkd"
    more = {"loss_impl": "dense"} if is_gkd else {}
    logs, weights, *_ = one.train(one.trainer, **{"max_steps": 5, **one.off[key[1]], **more})
    expected_logs, expected_weights, trainer, _ = of_trl[key]
    steps = trainer.state.global_step
    assert {"loss", "grad_norm"} <= expected_logs[0].keys() and len(expected_logs) == steps + 1 > 4  # and the summary
    if is_gkd:
        logs, expected_logs = logs[:steps], expected_logs[:steps]
        logs = [{name: entry[name] for name in expected} for entry, expected in zip(logs, expected_logs, strict=True)]
    assert logs == expected_logs
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", TRAINERS)
def test_config_of_trl_is_taken_with_flags_off(trainers, name):
    one = trainers[name]
    off = {**next(iter(one.off.values())), "max_steps": STEPS}
    run, expected = (one.train(one.trainer, config, **off) for config in (one.parent_config, one.config))
    assert run.logs == expected.logs
    assert isinstance(run.trainer.args, one.config)


# Methods that act


@selected(is_fast)
def test_row_trains(trainers, whole, key):
    """Otherwise the equalities above would hold for a method that does nothing."""
    one, run = trainers[key[0]], whole[key]
    start, *_ = row_of(key).keys.get("folders", ["policy" if key[0] == "grpo" else "student"])
    before = AutoModelForCausalLM.from_pretrained(one.models / start).state_dict()
    assert any((weight - before[name]).abs().max() > 1e-4 for name, weight in run.weights.items())


@pytest.mark.parametrize("name", [name for name, row in TRAINERS["sft"].rows.items() if row.methods])
def test_gate_changes_the_training(whole, name):
    run, off = whole["sft", name], whole["sft", "off"]
    assert 0 < run.logs[0]["profit/kept_fraction"] < 1
    assert run.logs[0]["profit/nll"] == pytest.approx(off.logs[0]["loss"], rel=1e-6)
    assert any((run.weights[key] - off.weights[key]).abs().max() > 1e-3 for key in off.weights)


def test_the_cases_of_grpo_are_of_every_kind(whole):
    """Every group shape that matters occurs, and what is compared above is not zero."""
    logs = whole["grpo", "both"].logs
    assert all(entry["shaping/edas/delta_abs"] > 0 and entry["hidden_align/aligned"] > 0 for entry in logs[:2])
    assert 0 < logs[0]["shaping/answered"] < 1
    logs = whole["grpo", "answers balanced, steps judged"].logs
    assert any(entry["shaping/srar/judged"] > 0 for entry in logs[:2])
    for name in ("calibadv", "srar"):
        assert any(entry[f"shaping/{name}/delta_abs"] > 0 for entry in logs[:2])
    logs = whole["grpo", "searches"].logs
    for key in ("steps_relieved", "delta_abs", "step_quality"):
        assert all(entry[f"shaping/calibadv/{key}"] > 0 for entry in logs[:2]), key
    classes = [whole["grpo", name].logs[0]["shaping/edas/classes_per_group"] for name in ("edas, equivalence", "edas")]
    assert classes[0] < classes[1]
    for name in ("tokens", "hidden-align"):
        assert abs(whole["grpo", name].logs[0]["grad_norm"] - whole["grpo", "edas"].logs[0]["grad_norm"]) > 1e-3


@selected(named(sft=["random"], gkd=["hpd", "reverse_kl, either"], distillation=["exopd"]))
def test_draws_follow_the_seed(trainers, whole, key):
    """A method that draws does so from the seed alone, and no other method from it."""
    one, row = trainers[key[0]], row_of(key)
    seeded = [one.train_row(row, seed=seed) for seed in (42, 43)]
    assert seeded[0].logs == whole[key].logs
    torch.testing.assert_close(seeded[0].weights, whole[key].weights, rtol=0, atol=0)
    draws = row.keys.get("profit_mode") == "random" or 0 < row.keys.get("lmbda", 0) < 1
    objective = getattr(seeded[0].trainer, "objective", None)
    draws |= getattr(objective, "draws", False) and row.keys.get("hpd_sample", True)
    if draws:
        assert seeded[1].logs[:STEPS] != seeded[0].logs[:STEPS]
    else:  # but for the order in which TRL sums up what it has generated
        assert_same_training(one, seeded[1], seeded[0])


@selected(named(sft=["higher"], gkd=["akl, code mixed"], distillation=["exopd"], grpo=["both"]))
def test_streamed_data_trains_as_data_in_memory(trainers, whole, key):
    one, row = trainers[key[0]], row_of(key)
    given = row.keys.get("rows")
    data = one.data() if given is None else one.data().from_list(given)
    assert_same_training(one, one.train_row(row, rows=data.to_iterable_dataset()), whole[key])


@selected(named(sft=["random"], gkd=["hpd", "exopd"], distillation=["exopd"], grpo=["both, warming up"]))
def test_resuming_is_exact(trainers, tmp_path, key):
    """With real sampling where the draws of GKD follow the step; the reference is the start of the run, not the checkpoint."""
    one, row = trainers[key[0]], row_of(key)
    config = {
        "trainer_class": one.trainer if key[0] == "gkd" else None,
        "output_dir": str(tmp_path),
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        **({"max_new_tokens": 6} if key[0] == "gkd" else {}),
    }
    run = one.train_row(row, **config)
    resumed = one.train_row(row, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **config)
    assert resumed.logs[2] == run.logs[2]
    if "edas_warmup_steps" in row.keys:
        assert run.logs[2]["shaping/edas/warmup"] == pytest.approx(2 / 3)
    torch.testing.assert_close(resumed.weights, run.weights, rtol=0, atol=0)


LORA = [
    (*key, path)
    for key in ROWS
    for path in dict.fromkeys(path for _, path in TRAINERS[key[0]].combinations(row_of(key)))
]


@selected(
    lambda key: (
        key[:2] in {("sft", "higher"), ("gkd", "loca"), ("gkd", "exopd"), ("distillation", "exopd"), ("grpo", "both")}
        and key[1:] != ("exopd", "dense")
    ),
    LORA,
)
def test_lora_starts_as_the_model_and_trains_itself_alone(trainers, whole, key):
    """Without adapters the model is also the reference that full training copies."""
    one, row = trainers[key[0]], row_of(key)
    lora = LoraConfig(r=4, target_modules="all-linear")
    more = {"beta": 0.1, "gradient_checkpointing": True} if key[0] == "grpo" else {}  # the divergence from itself is 0
    run = one.train_row(row, path=key[2], peft_config=lora, learning_rate=1e-2, card=True, **more)
    first, expected = run.logs[0], whole[key[:2]].logs[0]
    for name in expected:
        if is_ours(one, name) and name != "grad_norm":
            assert first[name] == pytest.approx(expected[name], rel=one.rel, abs=one.abs), name
    base = one.train_row(row, path=key[2], learning_rate=0.0).weights
    for name, weight in base.items():
        name = "base_model.model." + name
        name = name if name in run.weights else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(run.weights[name], weight)
    assert all(weight.any() for name, weight in run.weights.items() if "lora_B" in name)
    assert ModelCard(run.card).data.library_name == "peft"
    is_neo = key[0] == "gkd" and row.keys["objective"] == "forward_kl"
    assert ("llm_neo" in run.trainer._methods) == ("llm_neo" in run.trainer._tag_names) == is_neo


# Teachers that are caches


CACHED = [
    key
    for key in ROWS
    if key[0] == "gkd"
    and row_of(key).keys["lmbda"] == 0
    and catalog()[row_of(key).keys["objective"]].cached
    and "folders" not in row_of(key).keys
]


@selected(lambda key: key[1] in ("forward_kl", "akl", "loca", "akl, code mixed"), CACHED)
def test_cached_teacher_of_the_whole_vocabulary(trainers, whole, tmp_path, key):
    """Taken from the dataset in one order and one layout, read in another, without a teacher in memory."""
    one, row = trainers[key[0]], row_of(key)
    capture(one, tmp_path / "cache", k=128, **row.keys, **one.splits(row)["whole"])
    cached = one.train_row(row, teacher=CachedTeacher(tmp_path / "cache"))
    assert_same_training(one, cached, whole[key])


# Formulas on all logits


DISTILLED = [
    key
    for key in ROWS  # of halves a step is a part of the rows; there the splits agree
    if key[0] in ("gkd", "distillation") and not row_of(key).group.startswith("nothing")
]


@selected(is_fast, DISTILLED)
def test_first_step_is_that_of_dense_logits(trainers, whole, key):
    """Its loss, its gradient, and every number of a method in the logs."""
    one, row, run = trainers[key[0]], row_of(key), whole[key]
    dense = Dense(one, row, run.trainer)
    dense.loss.backward()
    gradients = [parameter.grad for parameter in dense.models["student"].parameters()]
    log = run.logs[0]
    assert log["loss"] == pytest.approx(dense.loss.item(), rel=1e-4, abs=2e-6)
    assert log["grad_norm"] == pytest.approx(torch.stack([one.norm() for one in gradients]).norm().item(), rel=1e-4)
    if run.trainer.teacher_model is not None and one.name == "distillation":
        return  # TRL's loss, which logs no number of ours
    if one.name == "distillation":
        weights = one.train_row(row, max_steps=1).weights
        for name, parameter in dense.models["student"].named_parameters():
            torch.testing.assert_close(weights[name], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=2e-6)
    dense.values["kept_fraction"] = torch.tensor([len(dense.values["entropy"]) / dense.tokens])
    if "outside_vocabulary_fraction" in log:
        dense.values["outside_vocabulary_fraction"] = torch.tensor([dense.outside / dense.labels])
    theirs, unlabelled = {"loss", "grad_norm", *one.theirs}, {"ce", "kd"}
    extremes = {metric.name for name in row.methods for metric in catalog()[name].metrics if metric.extremes}
    ends = {f"{name}_{end}" for name in extremes for end in ("min", "max")}
    assert (OURS & log.keys()) - theirs <= dense.values.keys() | ends
    assert dense.values.keys() - theirs - log.keys() <= unlabelled
    for name in dense.values.keys() & log.keys() - theirs:
        values = dense.values[name]
        assert log[name] == pytest.approx(values.mean().item(), rel=1e-4, abs=2e-6), name
        if name in extremes:
            found = [log[f"{name}_{end}"] for end in ("min", "max")]
            assert found == pytest.approx([values.min().item(), values.max().item()], rel=1e-4, abs=2e-6), name


# Shapers


def statistics(before, after):
    moved = (after - before).abs()
    return {
        "mean": after.mean(),
        "std": after.std(correction=0),
        "changed": (moved > 0).double().mean(),
        "delta_abs": moved.mean(),
        "flipped": (before * after < 0).double().mean(),
    }


ONE_SHAPER = [key for key in ROWS if key[0] == "grpo" and row_of(key).methods[:1] not in ((), ("hidden_align",))]
ONE_SHAPER = [key for key in ONE_SHAPER if row_of(key).group != "several"]


@selected(is_fast, ONE_SHAPER)
def test_numbers_of_a_shaper_are_those_of_its_advantages(whole, key):
    """Of the last step, over rollouts or over the tokens in the loss; and of some, what they say of answers."""
    run = whole[key]
    (shaper,), log, (before, after, context) = run.trainer.shapers, run.logs[STEPS - 1], run.trainer.kept
    assert names_of(SHAPING_METRICS, f"shaping/{shaper.name}/") <= log.keys()
    if shaper.level == "token":
        before, after = before[:, None].expand_as(after)[context.mask], after[context.mask]
    expected = statistics(before.double(), after.double())
    texts, right = [completion[-1]["content"] for completion in context.completions], context.correct
    answers = [extract_answer(text) for text in texts]
    groups = [slice(start, start + 4) for start in range(0, len(texts), 4)]
    if shaper.name == "pass_at_k":
        rewards = [1 - comb(4 - int(right[group].sum()), 2) / comb(4, 2) for group in groups]
        silent = [reward in (0, 1) for reward in rewards]
        expected |= {"reward": sum(rewards) / len(groups), "groups_silent": sum(silent) / len(groups)}
    if key[1] == "edas":
        kinds = [Counter(a for a, ok in zip(answers[g], right[g].tolist(), strict=True) if not ok) for g in groups]
        expected |= {
            "groups_diverse": sum(len(kind) > 1 for kind in kinds),
            "groups_collapsed": sum(len(kind) == 1 and kind.total() > 1 for kind in kinds),
            "groups_skipped": sum(kind.total() <= 1 for kind in kinds),
            "wrong_per_group": sum(kind.total() for kind in kinds) / len(kinds),
            "classes_per_group": sum(map(len, kinds)) / len(kinds),
            "warmup": 1.0,
        }
    if "shaping/answered" in log:
        assert log["shaping/answered"] == pytest.approx(sum(one is not None for one in answers) / len(answers))
    for name, value in expected.items():
        assert log[f"shaping/{shaper.name}/{name}"] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


def test_cosines_of_hidden_align_are_those_of_the_states(trainers):
    """At the last token before each right answer, in groups that have a wrong one too."""
    one = trainers["grpo"]
    run = one.train_row(one.rows["hidden-align"], learning_rate=0.0, max_steps=1)
    log, (batch,) = run.logs[0], run.trainer._buffered_inputs
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    model = AutoModelForCausalLM.from_pretrained(one.models / "policy")
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    states = torch.nn.functional.normalize(hidden[torch.arange(len(ids)), batch["align_position"]], dim=-1)
    aligned = [index for index, weight in enumerate(batch["align_weight"].tolist()) if weight > 0]
    assert log["hidden_align/aligned"] == pytest.approx(len(aligned) / len(ids))
    within, across = {}, []
    for first, second in permutations(aligned, 2):
        prompts_of = [tuple(batch["prompt_ids"][index].tolist()) for index in (first, second)]
        cosines = within.setdefault(prompts_of[0], []) if prompts_of[0] == prompts_of[1] else across
        cosines.append(float(states[first] @ states[second]))
    means = [sum(cosines) / len(cosines) for cosines in within.values()]
    assert log["hidden_align/cosine"] == pytest.approx(sum(means) / len(means), abs=1e-5)
    assert log["hidden_align/cosine_across"] == pytest.approx(sum(across) / len(across), abs=1e-5)


# What a run leaves behind


@selected(is_fast)
def test_card_is_valid_and_names_the_methods(whole, key):
    run = whole[key]
    card, methods = ModelCard(run.card), run.trainer._all_methods
    assert card.data.library_name == "transformers" and {"hf_rb", *methods} <= {*card.data.tags}
    assert f"{type(run.trainer).__name__}" in run.card
    papers = [catalog()[name].paper for name in methods]
    expected = {name for name in row_of(key).methods if catalog()[name].paper} - {"llm_neo"}
    assert expected == {*methods}
    for paper in papers:
        assert f"huggingface.co/papers/{paper.id}" in run.card and f"{{{paper.title}}}" in run.card


@selected(is_fast)
def test_every_number_in_the_logs_is_documented(whole, of_trl, key):
    """Those that TRL's trainer does not log with other rewards and without tools. A shaper of one's own has no record."""
    theirs = {name for entry in of_trl[next(one for one in OFF if one[0] == key[0])].logs for name in entry}
    logged = {name for entry in whole[key].logs for name in entry} - theirs
    assert {name for name in logged if not name.startswith(("shaping/ramp/", "rewards/", "tools/"))} <= OURS


def test_every_documented_number_is_in_some_log(whole):
    """Of mixtures of experts see `test_mixtures.py`."""
    logged = {name for key in ROWS if is_fast(key) for entry in whole[key].logs for name in entry}
    assert {name for name in OURS - logged if not name.startswith("router/")} == {"aux_loss"}
