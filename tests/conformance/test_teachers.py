"""Teachers that stand for others: caches of a part of the vocabulary, the student without its adapters, and padded ones."""

import json

import pytest
import torch
from all_rows import capture
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_rb.teachers import AdapterOffTeacher, CachedTeacher


FLAT = {
    "akl": ({"objective": "akl", "akl_mu": 0.15}, ["akl/head_size"]),
    "akl, code": ({"objective": "akl", "akl_mu": 0.15, "akl_head_rule": "code"}, ["akl/head_size"]),
    "loca": ({"objective": "forward_kl", "loca_alpha": 0.95}, ["loca/scale", "loca/corrected_fraction"]),
}


@pytest.mark.parametrize("keys, exact", FLAT.values(), ids=FLAT)
def test_a_cache_of_few_tokens_of_a_flat_teacher(trainers, tmp_path, keys, exact):
    """The rest is the most probable event everywhere here: it fills no head of AKL, and no label has to beat it."""
    one, keys = trainers["gkd"], {"per_device_train_batch_size": 4, "lmbda": 0.0, **keys}
    capture(one, tmp_path / "cache", k=6, **keys)
    shard = json.loads((tmp_path / "cache/manifest.json").read_text())["shards"]["0"]
    assert shard["tail_mass"] / shard["tokens"] > 0.7
    found = one.train(teacher=CachedTeacher(tmp_path / "cache"), **keys).logs[0]
    expected = one.train(**keys).logs[0]
    assert [found[key] for key in exact] == pytest.approx([expected[key] for key in exact], rel=1e-5)
    assert found["forward_kl"] <= expected["forward_kl"] + 1e-6  # a cache knows less
    if "akl/weight" in found:
        assert expected["akl/head_size"] > 1 and found["akl/weight"] >= expected["akl/weight"] - 1e-6


def test_adapter_off_teacher_is_the_base_model(trainers):
    """LoRA with weights that do something, so that teacher and student differ."""
    one, lora = trainers["gkd"], {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    config = {"per_device_train_batch_size": 4, "objective": "akl", "lmbda": 0.0}
    base = AutoModelForCausalLM.from_pretrained(one.models / "student")
    runs = [
        one.train(peft_config=LoraConfig(**lora), teacher=teacher, **config)
        for teacher in (one.local(base), AdapterOffTeacher())
    ]
    torch.testing.assert_close(runs[0].weights, runs[1].weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_from_a_padded_teacher_is_trls_on_the_shared_ids(trainers, beta):
    """TRL refuses a teacher of another width, so its own runs with the padding cut off."""
    one = trainers["distillation"]
    teacher = AutoModelForCausalLM.from_pretrained(one.models / "teacher")
    teacher.resize_token_embeddings(AutoModelForCausalLM.from_pretrained(one.models / "student").config.vocab_size)
    config = {"per_device_train_batch_size": 4, "beta": beta, "temperature": 1.4}
    run, expected = one.train(**config), one.train(teacher=teacher, **config)
    assert run.trainer.teacher_model is None  # not TRL's loss
    for entry, expected_entry in zip(run.logs[:2], expected.logs[:2], strict=True):
        for key in ("loss", "grad_norm", "entropy"):
            assert entry[key] == pytest.approx(expected_entry[key], rel=2e-5), key
    torch.testing.assert_close(run.weights, expected.weights, rtol=1e-4, atol=1e-6)
