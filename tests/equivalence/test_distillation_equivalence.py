"""Without flags the trainer is TRL's; with them, it is the dense formulas, however a batch is split over steps and processes."""

import distillation_cases as cases
import pytest
import torch
import trl
from helpers.seeded_runs import Runs
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb import DistillationConfig, DistillationTrainer
from hf_rb.objectives import adaptive_kl, forward_kl, reverse_kl


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    cases.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def whole(models):
    """Every case in one process, four prompts a step in one padded batch."""
    return Runs(lambda name: cases.train(models, per_device_train_batch_size=4, **cases.CASES[name]))


VARIANTS = {
    "plain": {},
    "adam, accumulation, shuffled": {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
        "shuffle_dataset": True,
        "beta": 0.5,
    },
    "bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True, "beta": 0.0, "temperature": 1.3},
    "lora": {"peft": LoraConfig(r=4, target_modules="all-linear"), "learning_rate": 1.0},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_flags_off_is_trl_bit_for_bit(models, variant):
    """Completions are sampled here, so the random numbers must be TRL's too."""
    config = {"per_device_train_batch_size": 2, "max_steps": 5, "teacher": "other", **variant}
    logs, weights, _ = cases.train(models, DistillationTrainer, DistillationConfig, **config)
    expected_logs, expected_weights, _ = cases.train(models, trl.DistillationTrainer, trl.DistillationConfig, **config)
    assert logs == expected_logs
    assert len(logs) == 6  # five steps and the summary
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)


def test_trl_config_is_taken_with_flags_off(models):
    config = {"per_device_train_batch_size": 2, "teacher": "other"}
    logs, _, trainer = cases.train(models, config_class=trl.DistillationConfig, **config)
    expected, _, _ = cases.train(models, **config)
    assert logs == expected
    assert isinstance(trainer.args, DistillationConfig)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_from_a_padded_teacher_is_trls_on_the_shared_ids(models, beta):
    """TRL refuses a teacher of another width, so its own runs with the padding cut off."""
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
    teacher.resize_token_embeddings(AutoModelForCausalLM.from_pretrained(models / "student").config.vocab_size)
    config = {"per_device_train_batch_size": 4, "beta": beta, "temperature": 1.4}
    logs, weights, trainer = cases.train(models, **config)
    assert trainer.teacher_model is None  # not TRL's loss
    expected_logs, expected_weights, _ = cases.train(models, teacher=teacher, **config)
    for entry, expected in zip(logs[: cases.STEPS], expected_logs, strict=False):
        for key in ("loss", "grad_norm", "entropy"):
            assert entry[key] == pytest.approx(expected[key], rel=2e-5), key
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)


def dense_step(models, name, lr=0.1):
    """The first step of a case by the formulas, one unpadded sequence at a time. Returns the loss and the weights after it."""
    case = cases.CASES[name]
    objective, scale = case["objective"], case.get("reward_scale", 1.0)
    student, teacher, other, start = (
        AutoModelForCausalLM.from_pretrained(models / folder) for folder in ("student", "teacher", "other", "student")
    )
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    total, means, sums = 0.0, [], []
    tokens = 0
    for row in cases.prompts(4):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        completion = cases.completion_of(prompt)
        expert = other if name == "routed" and row["domain"] == "code" else teacher

        ids = torch.tensor([prompt + completion])
        z, z_t, z_r = (
            model(ids).logits[0, len(prompt) - 1 : -1, : student.config.vocab_size]
            for model in (student, expert, start)
        )
        z_t, z_r = z_t.detach(), z_r.detach()
        if objective != "gopd":
            temperature = case.get("temperature", 1.0)
            formula = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "akl": adaptive_kl}[objective]
            losses = formula(z, z_t, temperature=temperature)
        elif name == "full":
            losses = reverse_kl(z, scale * z_t + (1 - scale) * z_r)
        else:
            log_q, log_t, log_r = (x.log_softmax(-1)[range(len(completion)), completion] for x in (z, z_t, z_r))
            bound = case.get("gopd_logratio_clamp", torch.inf)
            gap, reward = ((a - b).detach().clamp(-bound, bound) for a, b in ((log_t, log_q), (log_t, log_r)))
            losses = -(gap + (scale - 1) * reward) * (log_q - log_q.detach()).exp()
        means.append(losses.mean())
        sums.append(losses.sum())
        tokens += len(completion)
    aggregation = case.get("gopd_aggregation", "seq-mean-token-mean") if objective == "gopd" else "token-mean"
    total = {
        "seq-mean-token-mean": torch.stack(means).mean(),
        "token-mean": torch.stack(sums).sum() / tokens,
        "seq-mean-token-sum": torch.stack(sums).mean(),
    }[aggregation]
    total.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= lr * parameter.grad
    return total.item(), student.state_dict()


@pytest.mark.parametrize("name", cases.CASES)
def test_one_step_is_that_of_dense_logits(models, name):
    loss, expected = dense_step(models, name)
    logs, weights, _ = cases.train(models, per_device_train_batch_size=4, max_steps=1, **cases.CASES[name])
    assert logs[0]["loss"] == pytest.approx(loss, rel=1e-4, abs=2e-6)
    torch.testing.assert_close(weights, dict(expected), rtol=1e-4, atol=2e-6)


OURS = ("loss", "grad_norm", "entropy", "forward_kl", "reverse_kl", "akl/", "gopd/", "kept_fraction")


def assert_same_training(actual, expected):
    (logs, weights), (expected_logs, expected_weights) = actual[:2], expected[:2]
    for entry, expected_entry in zip(logs[: cases.STEPS], expected_logs, strict=False):
        for key, value in expected_entry.items():
            # TRL averages its entropy over micro-batches of unequal size.
            if key.startswith(OURS) and key != "entropy":
                assert entry[key] == pytest.approx(value, rel=1e-4, abs=2e-6), key
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("size, steps", [(2, 2), (1, 4)])
def test_accumulation(models, whole, name, size, steps):
    split = cases.train(
        models, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **cases.CASES[name]
    )
    assert_same_training(split, whole[name])


def test_two_processes(models, whole, in_two_processes):
    results = in_two_processes("distillation_cases")
    for name in cases.CASES:
        assert_same_training(results[name], whole[name])
    assert_same_training(results["accumulated"], whole["exopd"])
