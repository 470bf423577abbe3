import json
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hf_rb import DistillationConfig, DistillationTrainer, GKDConfig, GKDTrainer, SFTConfig, SFTTrainer, tiny
from hf_rb.objectives import reverse_kl
from hf_rb.trainers.common.token_samples import (
    TOKEN_SAMPLES,
    CompletionSamplesCallback,
    TokenSamplesCallback,
    add_token_samples,
)


def data(config="prompt_completion", size=8):
    columns = ["prompt"] if config == "prompt_only" else ["prompt", "completion"]
    return tiny.load_dataset("math", config=config, size=size).select_columns(columns)


def read(folder):
    return json.loads(Path(folder, TOKEN_SAMPLES).read_text())


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_profit_before_and_after_a_training_that_does_not_notice(student, config):
    trained = []
    for sampled in (False, True):
        args = SFTConfig(**config, profit_threshold=0.001, profit_mode="random", learning_rate=1e-3)
        trainer = SFTTrainer(str(student), args=args, train_dataset=data())
        if sampled:
            add_token_samples(trainer)
        trainer.train()
        trained.append(weights(trainer))
    assert all(map(torch.equal, *trained))

    found = read(config["output_dir"])
    assert found["methods"] == ["profit"] and [one["step"] for one in found["snapshots"]] == [0, 2]
    row = found["snapshots"][0]["rows"][0]
    assert "".join(row["tokens"]).startswith("<|im_start|>user") and row["prob"][0] is None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student).eval(), AutoTokenizer.from_pretrained(student)
    ids = tokenizer("".join(row["tokens"]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probs = model(ids).logits[0, :-1].softmax(-1)
    last = len(row["tokens"]) - 1
    assert row["prob"][last] == pytest.approx(probs[last - 1, ids[0, last]].item(), abs=1e-4)
    assert row["top_prob"][last] == pytest.approx(probs[last - 1].max().item(), abs=1e-4)
    assert {type(value) for value in row["kept"] if value is not None} == {bool}


def test_completions_of_the_student_are_the_same_with_it(student, config):
    trained = []
    for sampled in (False, True):
        args = GKDConfig(**config, lmbda=1.0, objective="reverse_kl", max_new_tokens=8, learning_rate=1e-3)
        trainer = GKDTrainer(
            str(student), teacher_model=str(tiny.path("teacher")), args=args, train_dataset=data("prompt_only")
        )
        if sampled:
            add_token_samples(trainer)
        trainer.train()
        trained.append(weights(trainer))
    assert all(map(torch.equal, *trained))


def test_without_flags_nothing_is_added(student, config):
    trainer = SFTTrainer(str(student), args=SFTConfig(**config), train_dataset=data())
    add_token_samples(trainer)
    assert not any(isinstance(one, TokenSamplesCallback) for one in trainer.callback_handler.callbacks)


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (dict(objective="akl", lmbda=0.0), {"akl_weight", "forward_kl", "reverse_kl"}),
        (dict(objective="hpd", lmbda=0.0), {"hpd_w_label", "hpd_w_sample", "reverse_kl"}),
        (dict(objective="gopd", lmbda=1.0, reward_scale=1.25, max_new_tokens=8, temperature=1.0), {"advantage"}),
    ],
)
def test_distillation(student, config, options, columns):
    args = GKDConfig(**config, **options)
    dataset = data("prompt_only" if options["objective"] == "gopd" else "prompt_completion")
    trainer = GKDTrainer(str(student), teacher_model=str(tiny.path("teacher")), args=args, train_dataset=dataset)
    trainer.add_callback(TokenSamplesCallback(trainer, rows=2, tokens=400))
    trainer.train()
    rows = [row for snapshot in read(args.output_dir)["snapshots"] for row in snapshot["rows"]]
    assert len(rows) == 4
    for row in rows:
        assert columns | {"top10", "prob", "correct", "loss"} <= row.keys()
        trained = [place for place, value in enumerate(row["loss"]) if value is not None]
        assert trained and all(len(values) == len(row["tokens"]) for values in row.values())
        assert all(0 <= row["top10"][place] <= 1 for place in trained)


def test_the_divergence_is_that_of_the_two_models(student, config):
    args = GKDConfig(**config, objective="reverse_kl", lmbda=0.0)
    teacher = AutoModelForCausalLM.from_pretrained(tiny.path("teacher"))
    trainer = GKDTrainer(str(student), teacher_model=teacher, args=args, train_dataset=data())
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    with torch.no_grad():
        stats = trainer.token_stats(inputs)
        logits = [model.eval()(input_ids=inputs["input_ids"]).logits[:, :-1] for model in (trainer.model, teacher)]
    expected = reverse_kl(*(one[stats.is_label] for one in logits))
    torch.testing.assert_close(stats.values["reverse_kl"], expected, rtol=1e-3, atol=1e-4)


def on_policy(student, config, **options):
    options = {"max_completion_length": 8, "learning_rate": 1e-3, "gradient_accumulation_steps": 2} | options
    args = DistillationConfig(**config | options)
    return DistillationTrainer(str(student), str(tiny.path("teacher")), args, data("prompt_only"))


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (dict(objective="jsd"), {"forward_kl", "reverse_kl"}),
        (dict(objective="akl", temperature=0.8), {"akl_weight", "forward_kl", "reverse_kl"}),
        (dict(objective="gopd", reward_scale=1.25), {"advantage", "reward"}),
        (dict(objective="gopd", reward_scale=1.25, gopd_full_vocab=True), {"reverse_kl"}),
    ],
)
def test_completions_that_a_step_is_made_from(student, config, options, columns):
    trained = []
    for sampled in (False, True):
        trainer = on_policy(student, config, **options)
        if sampled:
            add_token_samples(trainer)
        trainer.train()
        trained.append(weights(trainer))
    assert all(map(torch.equal, *trained))

    snapshots = read(config["output_dir"])["snapshots"]
    batch = 2 * config["per_device_train_batch_size"]
    assert [(one["step"], len(one["rows"])) for one in snapshots] == [(0, batch), (2, batch)]
    for row in (row for snapshot in snapshots for row in snapshot["rows"]):
        assert columns | {"top10", "prob", "correct", "loss"} <= row.keys()
        assert row["tokens"][0] == "<|im_start|>" and all(len(values) == len(row["tokens"]) for values in row.values())
        is_trained = [value is not None for value in row["loss"]]
        assert 0 < sum(is_trained) <= 8 and all(is_trained[-sum(is_trained) :])  # the completion, without padding


def test_the_loss_of_the_sampled_completions_is_the_trainers(student, config):
    """Before the first step, on the tokens that the first loss is the mean of."""
    trainer = on_policy(student, config, objective="akl", logging_steps=1, max_steps=1)
    trainer.add_callback(CompletionSamplesCallback(trainer))
    trainer.train()
    first, _ = read(config["output_dir"])["snapshots"]
    losses = [value for row in first["rows"] for value in row["loss"] if value is not None]
    assert sum(losses) / len(losses) == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-3, abs=1e-4)


def test_add_token_samples_takes_any_trainer_of_transformers(student, tmp_path):
    assert get_type_hints(add_token_samples)["trainer"] is Trainer
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(student))
    before = list(trainer.callback_handler.callbacks)
    add_token_samples(trainer)
    assert trainer.callback_handler.callbacks == before
