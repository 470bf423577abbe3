"""Without flags the trainer is TRL's; with them, a step does not depend on how its rollouts are spread over batches and processes."""

import grpo_cases as cases
import pytest
import torch
import trl
from helpers.seeded_runs import Runs
from peft import LoraConfig

from hf_rb import GRPOConfig, GRPOTrainer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    cases.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def whole(models):
    """Every case in one process and one batch."""
    return Runs(lambda name: cases.train(models, per_device_train_batch_size=cases.ROLLOUTS, **cases.CASES[name]))


def letters(completions, **kwargs):
    """A reward that sampled completions differ in."""
    return [float(len(set(completion[-1]["content"]))) for completion in completions]


VARIANTS = {
    "plain": {},
    "adam, accumulation, two iterations": {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "shuffle_dataset": True,
    },
    "bf16, checkpointing, reference": {"bf16": True, "gradient_checkpointing": True, "beta": 0.1, "loss_type": "grpo"},
    "lora": {"peft": LoraConfig(r=4, target_modules="all-linear"), "learning_rate": 1.0, "beta": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_flags_off_is_trl_bit_for_bit(models, variant):
    """Completions are sampled here, so the random numbers must be TRL's too."""
    config = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "reward": letters,
        "max_completion_length": 8,
        **variant,
    }
    logs, weights, _ = cases.train(models, GRPOTrainer, GRPOConfig, **config)
    expected_logs, expected_weights, _ = cases.train(models, trl.GRPOTrainer, trl.GRPOConfig, **config)
    assert logs == expected_logs
    assert len(logs) == 5  # four steps and the summary
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)


def test_trl_config_is_taken_with_flags_off(models):
    config = {"per_device_train_batch_size": 8, "reward": letters, "gradient_accumulation_steps": 2}
    logs, _, trainer = cases.train(models, GRPOTrainer, trl.GRPOConfig, **config)
    expected, _, _ = cases.train(models, GRPOTrainer, GRPOConfig, **config)
    assert logs == expected
    assert isinstance(trainer.args, GRPOConfig)


OURS = ("loss", "grad_norm", "shaping/", "hidden_align/", "reward")


def assert_same_training(actual, expected):
    (logs, weights), (expected_logs, expected_weights) = actual[:2], expected[:2]
    for entry, expected_entry in zip(logs[: cases.STEPS], expected_logs, strict=False):
        for key, value in expected_entry.items():
            if key.startswith(OURS):
                assert entry[key] == pytest.approx(value, rel=1e-4, abs=2e-6), key
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=2e-6)


def test_the_cases_act(whole):
    """Every group shape that matters occurs, and what is compared below is not zero."""
    logs = whole["both"][0]
    assert all(entry["shaping/edas/delta_abs"] > 0 and entry["hidden_align/aligned"] > 0 for entry in logs[:2])
    assert 0 < logs[0]["shaping/answered"] < 1
    logs = whole["answers balanced, steps judged"][0]
    assert any(entry["shaping/srar/judged"] > 0 for entry in logs[:2])
    for name in ("calibadv", "srar"):
        assert any(entry[f"shaping/{name}/delta_abs"] > 0 for entry in logs[:2])
    logs = whole["searches"][0]
    for key in ("steps_relieved", "delta_abs", "step_quality"):
        assert all(entry[f"shaping/calibadv/{key}"] > 0 for entry in logs[:2]), key
    classes = [whole[name][0][0]["shaping/edas/classes_per_group"] for name in ("edas, equivalence", "edas")]
    assert classes[0] < classes[1]
    for name in ("tokens", "hidden-align"):
        assert abs(whole[name][0][0]["grad_norm"] - whole["edas"][0][0]["grad_norm"]) > 1e-3


@pytest.mark.parametrize("name", ["edas", "tokens", "answers balanced, steps judged", "searches", "hidden-align"])
@pytest.mark.parametrize("size", [6, 3])
def test_accumulation(models, whole, name, size):
    """Shuffled: the rollouts of a group are in different batches."""
    split = cases.train(
        models,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=cases.ROLLOUTS // size,
        **cases.CASES[name],
    )
    assert_same_training(split, whole[name])


def test_two_processes(models, whole, in_two_processes):
    """The second of three groups is half in one process and half in the other."""
    results = in_two_processes("grpo_cases")
    for name in cases.CASES:
        assert_same_training(results[name], whole[name])
    assert_same_training(results["accumulated"], whole["both"])
