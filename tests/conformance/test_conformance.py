"""
Every trainer with every method through the same checks. Rows follow from the records of methods (`*_cases.py`), so a new method needs
no line here. The fast tests train every row, and every group of rows in every split; the slow ones all the rest.
"""

import pytest
import torch
from conftest import TRAINERS
from described import STEPS
from helpers.pairwise import cover
from helpers.records import documented
from helpers.seeded_runs import Runs
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_rb.methods.registry import catalog
from hf_rb.teachers import CachedTeacher, cache_teacher


ROWS = [(name, row) for name, trainer in TRAINERS.items() for row in trainer.rows]
OURS = documented()


def row_of(key):
    return TRAINERS[key[0]].rows[key[1]]


def group_of(key):
    row = row_of(key)
    return row.group or (row.methods or (row.name,))[0]


def selected(fast, rows=ROWS):
    """Parametrizes a test by rows. Those of which `fast` says so run in the fast tests."""
    return pytest.mark.parametrize(
        "key",
        [pytest.param(key, id="-".join(key), marks=() if fast(key) else pytest.mark.slow) for key in rows],
    )


def named(**names):
    """Rows by trainer."""
    return lambda key: key[1] in names.get(key[0], ())


def is_ours(trainer, name):
    """Whether a number must not depend on how a batch is split."""
    if name in ("loss", "grad_norm") or name.startswith(trainer.also):
        return True
    return name in OURS - trainer.theirs


def assert_same_training(trainer, actual, expected, steps=slice(STEPS)):
    for entry, expected_entry in zip(actual[0][steps], expected[0][steps], strict=True):
        names = {name for name in expected_entry if is_ours(trainer, name)}
        assert names == {name for name in entry if is_ours(trainer, name)}
        for name in names:
            value = pytest.approx(expected_entry[name], rel=trainer.rel, abs=trainer.abs)
            assert entry[name] == value, name
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=trainer.weights_abs)


# Splits


def splits():
    keys = [
        (*key, split, path) for key in ROWS for split, path in list(TRAINERS[key[0]].combinations(row_of(key)))[1:]
    ]

    def meetings(key):
        name, row, split, path = key
        kind = "processes" if "processes" in split else "micro-batches" if split[0].isdigit() else split
        return {(name, row), (name, group_of(key), kind), (name, group_of(key), path), (name, split, path)}

    chosen = {*cover(keys, meetings)}
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


@selected(lambda key: True)
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


@selected(named(sft=["random", "higher"], gkd=["hpd", "reverse_kl, either"], distillation=["exopd"], grpo=["both"]))
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


@selected(named(sft=["higher"], gkd=["akl, mixed"], distillation=["exopd"], grpo=["both"]))
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
    is_neo = row.keys.get("objective") == "forward_kl"
    assert ("llm_neo" in run.trainer._methods) == ("llm_neo" in run.trainer._tag_names) == is_neo


# Teachers that are caches


CACHED = [
    key
    for key in ROWS
    if key[0] == "gkd" and row_of(key).keys["lmbda"] == 0 and catalog()[row_of(key).keys["objective"]].cached
]


@selected(lambda key: key[1] in ("forward_kl", "akl", "akl, mixed", "loca", "akl, code mixed"), CACHED)
def test_cached_teacher_of_the_whole_vocabulary(trainers, whole, tmp_path, key):
    """Taken from the dataset in one order and one layout, read in another, without a teacher in memory."""
    one, row = trainers[key[0]], row_of(key)
    capture(one, tmp_path / "cache", k=128, **row.keys, **one.splits(row)["whole"])
    cached = one.train_row(row, teacher=CachedTeacher(tmp_path / "cache"))
    assert_same_training(one, cached, whole[key])


def capture(one, folder, k, **keys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.trainer, "train", lambda trainer, **_: cache_teacher(trainer, folder, k=k, dtype="float32"))
        one.train(**keys)


# What a run leaves behind


@selected(lambda key: True)
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


@pytest.mark.parametrize("name", TRAINERS)
def test_every_number_in_the_logs_is_documented(trainers, whole, of_trl, name):
    """Those that TRL's trainer does not log with other rewards and without tools. A shaper of one's own has no record."""
    one = trainers[name]
    theirs = {key for entry in of_trl[next(key for key in OFF if key[0] == name)].logs for key in entry}
    for row in one.rows:
        logged = {key for entry in whole[name, row].logs for key in entry} - theirs
        assert {key for key in logged if not key.startswith(("shaping/ramp/", "rewards/", "tools/"))} <= OURS, row


def test_every_documented_number_is_in_some_log(whole):
    """Of mixtures of experts see `test_mixtures.py`."""
    logged = {name for key in ROWS for entry in whole[key].logs for name in entry}
    missing = {name for name in OURS - logged if not name.startswith("router/")}
    assert missing == {"aux_loss"}
