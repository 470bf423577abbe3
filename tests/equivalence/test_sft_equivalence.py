"""The same batch gives the same training, however it is split over steps, processes, padding and packing; flags off is TRL."""

import pytest
import sft_cases
import torch
import trl
from helpers.seeded_runs import Runs

from hf_rb import SFTConfig


GATED = [name for name in sft_cases.CASES if name != "off"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sft_cases.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model):
    """Every case in one process, four documents a step in one padded batch."""
    return Runs(lambda name: sft_cases.train(model, per_device_train_batch_size=4, **sft_cases.CASES[name]))


def assert_same_training(actual, expected, loss_only=False):
    (logs, weights), (expected_logs, expected_weights) = actual, expected
    for entry, expected_entry in zip(logs[: sft_cases.STEPS], expected_logs, strict=False):
        for key, value in expected_entry.items():
            # TRL averages its own metrics over micro-batches of unequal size, so those depend on the split.
            if key.startswith("profit/") or key in ("loss", "grad_norm"):
                assert entry[key] == pytest.approx(value, rel=2e-5, abs=1e-6), key
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)


VARIANTS = {
    "plain": {},
    "adam, accumulation, checkpointing": {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "packed, dft": {"packing": True, "max_length": 24, "loss_type": "dft"},
    "bf16, shuffled": {"bf16": True, "train_sampling_strategy": "random"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_flags_off_is_trl_bit_for_bit(model, variant):
    config = {"per_device_train_batch_size": 2, "max_steps": 5, **variant}
    logs, weights = sft_cases.train(model, **config)
    expected_logs, expected_weights = sft_cases.train(model, trl.SFTTrainer, trl.SFTConfig, **config)
    assert logs == expected_logs
    assert len(logs) == 6  # five steps and the summary
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)


def test_trl_config_is_taken_with_flags_off(model):
    logs, _ = sft_cases.train(model, config_class=trl.SFTConfig, per_device_train_batch_size=4)
    expected, _ = sft_cases.train(model, config_class=SFTConfig, per_device_train_batch_size=4)
    assert logs == expected


@pytest.mark.parametrize("name", GATED)
def test_gate_changes_the_training(whole, name):
    """Otherwise the equalities below would hold for a gate that does nothing."""
    (logs, weights), (off_logs, off_weights) = whole[name], whole["off"]
    assert 0 < logs[0]["profit/kept_fraction"] < 1
    assert logs[0]["profit/nll"] == pytest.approx(off_logs[0]["loss"], rel=1e-6)
    assert any((weights[key] - off_weights[key]).abs().max() > 1e-3 for key in weights)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("size, steps", [(2, 2), (1, 4)])
def test_accumulation(model, whole, name, size, steps):
    split = sft_cases.train(
        model, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **sft_cases.CASES[name]
    )
    assert_same_training(split, whole[name])


@pytest.mark.parametrize("name", ["higher", "random", "sequence", "random sequence"])
def test_padding_free(model, whole, name):
    free = sft_cases.train(
        model, per_device_train_batch_size=4, padding_free=True, max_length=None, **sft_cases.CASES[name]
    )
    assert_same_training(free, whole[name])


@pytest.mark.parametrize("name", ["higher", "random", "sequence", "random sequence"])
def test_packing(model, name):
    """All documents are in one step, since packing reorders them: 12 padded rows, or 4 rows of up to 24 tokens."""
    padded = sft_cases.train(model, per_device_train_batch_size=12, **sft_cases.CASES[name])
    packed = sft_cases.train(
        model,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        packing=True,
        max_length=24,
        **sft_cases.CASES[name],
    )
    assert_same_training(packed, padded)


def test_two_processes(model, whole, in_two_processes):
    results = in_two_processes("sft_cases")
    for name in sft_cases.CASES:
        assert_same_training(results[name], whole[name])
    assert_same_training(results["accumulated"], whole["random sequence"])
    for checkpoint, error in results["resume"]:  # one process reads the files, both hear of it
        assert checkpoint == "checkpoint-1"
        assert error.startswith("None of the 2 checkpoints")
