"""The same data gives the same distillation, whatever path computes it; where TRL's GKD is right, it is TRL's."""

import json

import gkd_cases
import pytest
import torch
from helpers.seeded_runs import Runs
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.utils import DataCollatorForChatML

from hf_rb import GKDConfig, GKDTrainer, tiny
from hf_rb.teachers import AdapterOffTeacher, CachedTeacher, cache_teacher
from hf_rb.utils import compat


CASES = gkd_cases.CASES
OFF_POLICY = [name for name, case in CASES.items() if case["lmbda"] == 0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    gkd_cases.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def whole(models):
    """Every case in one process, four documents a step in one padded batch."""
    return Runs(lambda name: gkd_cases.train(models, per_device_train_batch_size=4, **CASES[name]))


def assert_same_training(actual, expected):
    (logs, weights), (expected_logs, expected_weights) = actual, expected
    for entry, expected_entry in zip(logs[: gkd_cases.STEPS], expected_logs, strict=False):
        assert entry.keys() == expected_entry.keys()
        for key, value in expected_entry.items():
            assert entry[key] == pytest.approx(value, rel=5e-5, abs=2e-6), key
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_chunked_is_dense(models, whole, name):
    dense = gkd_cases.train(models, per_device_train_batch_size=4, loss_impl="dense", **CASES[name])
    assert_same_training(dense, whole[name])
    before = AutoModelForCausalLM.from_pretrained(models / "student").state_dict()
    assert any((weight - before[key]).abs().max() > 1e-4 for key, weight in dense[1].items())


@pytest.fixture(scope="module")
def full_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    gkd_cases.save_models(folder, vocabulary=len(tokenizer), padding=0)
    return folder


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("collator", ["ours", "TRL's"])
def test_dense_jsd_on_data_is_trl_bit_for_bit(full_models, beta, collator):
    """Through the whole path of each from `messages`. TRL pads on the left, which rounds differently: so one row, or its collator."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    config = {
        "rows": tiny.load_dataset("math", config="messages", size=16).select_columns("messages"),
        "beta": beta,
        "lmbda": 0.0,
        "max_steps": 5,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 1 if collator == "ours" else 4,
        "gradient_accumulation_steps": 2,
    }
    if collator == "TRL's":
        config |= {
            "data_collator": DataCollatorForChatML(tokenizer=tokenizer, max_length=1024),
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "remove_unused_columns": False,
        }
    expected_logs, expected = gkd_cases.train(full_models, compat.GKDTrainer, compat.GKDConfig, **config)
    logs, weights = gkd_cases.train(full_models, GKDTrainer, GKDConfig, loss_impl="dense", **config)
    for entry, expected_entry in zip(logs[:5], expected_logs[:5], strict=True):
        assert {key: entry[key] for key in expected_entry} == expected_entry
    assert {"loss", "grad_norm"} <= expected_logs[0].keys()
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


SPLITS = [(name, 1, 4) for name in CASES] + [(name, 2, 2) for name in ("jsd", "hpd", "exopd")]


@pytest.mark.parametrize("name, size, steps", SPLITS)
def test_accumulation(models, whole, name, size, steps):
    split = gkd_cases.train(models, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **CASES[name])
    assert_same_training(split, whole[name])


@pytest.mark.parametrize("name", ["akl, mixed", "loca", "hpd"])
@pytest.mark.parametrize("impl", ["chunked", "dense"])
def test_padding_free(models, whole, name, impl):
    free = gkd_cases.train(
        models, per_device_train_batch_size=4, padding_free=True, max_length=None, loss_impl=impl, **CASES[name]
    )
    assert_same_training(free, whole[name])


@pytest.mark.parametrize("name", OFF_POLICY)
def test_packing(models, name):
    """All documents are in one step, since packing reorders them: 12 padded rows, or 4 rows of up to 24 tokens."""
    padded = gkd_cases.train(models, per_device_train_batch_size=12, **CASES[name])
    packed = gkd_cases.train(
        models,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        packing=True,
        max_length=24,
        **CASES[name],
    )
    assert_same_training(packed, padded)


@pytest.mark.parametrize("name", ["forward_kl", "akl, mixed", "loca"])
def test_cached_teacher_of_the_whole_vocabulary(models, whole, tmp_path, name):
    """Taken from the dataset in one order and one layout, read in another, without a teacher in memory."""
    keys = {"per_device_train_batch_size": 4, **CASES[name]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            GKDTrainer,
            "train",
            lambda trainer, **_: cache_teacher(trainer, tmp_path / "cache", k=128, dtype="float32"),
        )
        gkd_cases.train(models, **keys)
    cached = gkd_cases.train(models, teacher=CachedTeacher(tmp_path / "cache"), **keys)
    assert_same_training(cached, whole[name])


@pytest.mark.parametrize(
    "keys, exact",
    [
        ({"objective": "akl", "akl_mu": 0.15}, ["akl/head_size"]),
        ({"objective": "akl", "akl_mu": 0.15, "akl_head_rule": "code"}, ["akl/head_size"]),
        ({"objective": "forward_kl", "loca_alpha": 0.95}, ["loca/scale", "loca/corrected_fraction"]),
    ],
    ids=["akl", "akl, code", "loca"],
)
def test_a_cache_of_few_tokens_of_a_flat_teacher(models, tmp_path, keys, exact):
    """The rest is the most probable event everywhere here: it fills no head of AKL, and no label has to beat it."""
    keys = {"per_device_train_batch_size": 4, "lmbda": 0.0, **keys}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            GKDTrainer, "train", lambda trainer, **_: cache_teacher(trainer, tmp_path / "cache", k=6, dtype="float32")
        )
        gkd_cases.train(models, **keys)
    shard = json.loads((tmp_path / "cache/manifest.json").read_text())["shards"]["0"]
    assert shard["tail_mass"] / shard["tokens"] > 0.7
    (found, *_), _ = gkd_cases.train(models, teacher=CachedTeacher(tmp_path / "cache"), **keys)
    (expected, *_), _ = gkd_cases.train(models, **keys)
    assert [found[key] for key in exact] == pytest.approx([expected[key] for key in exact], rel=1e-5)
    assert found["forward_kl"] <= expected["forward_kl"] + 1e-6  # a cache knows less
    if "akl/weight" in found:
        assert expected["akl/head_size"] > 1 and found["akl/weight"] >= expected["akl/weight"] - 1e-6


LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def test_adapter_off_teacher_is_the_base_model(models):
    """LoRA with weights that do something, so that teacher and student differ."""
    config = {"per_device_train_batch_size": 4, "objective": "akl", "lmbda": 0.0}
    base = AutoModelForCausalLM.from_pretrained(models / "student")
    _, weights = gkd_cases.train(
        models, peft_config=LoraConfig(**LORA), teacher=gkd_cases.local(models, base), **config
    )
    _, shared = gkd_cases.train(models, peft_config=LoraConfig(**LORA), teacher=AdapterOffTeacher(), **config)
    torch.testing.assert_close(weights, shared, rtol=1e-4, atol=1e-6)


def test_lora_reference_is_the_copied_student(models, whole):
    """The reference without adapters, and the copy that full training makes, are the same model: the losses agree at the start."""
    logs, _ = gkd_cases.train(models, peft_config=LoraConfig(r=4), per_device_train_batch_size=4, **CASES["exopd"])
    for key in ("loss", "gopd/reward", "gopd/advantage", "gopd/advantage_max"):
        assert logs[0][key] == pytest.approx(whole["exopd"][0][0][key], rel=1e-5)


@pytest.mark.parametrize("name", ["hpd", "exopd"])
def test_resuming_is_exact(models, tmp_path, name):
    """With real sampling for the on-policy case: the draws follow the step."""
    config = {
        "per_device_train_batch_size": 2,
        "output_dir": str(tmp_path),
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "optim": "adamw_torch",
        "max_new_tokens": 6,
        "learning_rate": 1e-3,
        **CASES[name],
    }
    logs, weights = gkd_cases.train(models, GKDTrainer, **config)
    resumed_logs, resumed = gkd_cases.train(
        models, GKDTrainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **config
    )
    assert resumed_logs[2] == logs[2]
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)


def test_two_processes(models, whole, in_two_processes):
    results = in_two_processes("gkd_cases")
    for name in CASES:
        assert_same_training(results[name], whole[name])
    assert_same_training(results["accumulated"], whole["hpd"])
    for name in ("akl, mixed", "hpd"):
        alone = gkd_cases.train(models, rows=gkd_cases.halves(), per_device_train_batch_size=2, **CASES[name])
        assert_same_training(results[f"{name}, one with nothing"], alone)
