import logging

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import AutoModelForCausalLM

from hf_rb import SFTConfig, SFTTrainer, tiny
from hf_rb.objectives import profit_mask
from hf_rb.ops.sequences import Sequences


@pytest.fixture(scope="module")
def data():
    return {name: tiny.load_dataset("math", config=name, size=16) for name in ("messages", "prompt_completion")}


def run(model, config, dataset, eval_dataset=None, **kwargs):
    trainer = SFTTrainer(str(model), SFTConfig(**config), train_dataset=dataset, eval_dataset=eval_dataset, **kwargs)
    trainer.train()
    return trainer


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


REFERENCES = {
    "higher": {"profit_threshold": 1e-3},
    "inclusive": {"profit_threshold": 1e-3, "profit_inclusive": True},
    "lower": {"profit_threshold": 1e-3, "profit_mode": "lower"},
    "middle": {"profit_threshold": 5e-4, "profit_mode": "middle", "profit_threshold_high": 2e-3},
    "random": {"profit_threshold": 0.3, "profit_mode": "random"},
    "sequence": {"profit_threshold": 1e-3, "profit_normalize": "sequence"},
    "kept": {"profit_threshold": 1e-3, "profit_normalize": "kept"},
}


@pytest.mark.parametrize("flags", REFERENCES.values(), ids=REFERENCES)
def test_one_step_is_that_of_dense_logits(student, config, data, flags):
    """The loss, its gradient (by one step of plain SGD) and the metrics, from the full logits and the paper's formula."""
    config |= {
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e3,
    }
    trainer = run(student, config | flags, data["prompt_completion"])
    batch = batch_of(trainer)

    model = AutoModelForCausalLM.from_pretrained(student)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels, is_label = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    gate = {key.removeprefix("profit_"): value for key, value in flags.items() if key != "profit_normalize"}
    if gate.get("mode") == "random":
        gate["uniforms"] = Sequences(batch).uniforms(trainer.args.seed, 0)[:, 1:]
    kept = is_label & profit_mask(log_probs, **gate)
    terms = -log_probs * kept
    loss = {
        "all": lambda: terms.sum() / is_label.sum(),
        "sequence": lambda: (terms.sum(-1) / is_label.sum(-1)).mean(),
        "kept": lambda: terms.sum() / kept.sum(),
    }[flags.get("profit_normalize", "all")]()
    loss.backward()

    logs, probs, dropped = trainer.state.log_history[0], log_probs.exp(), is_label & ~kept
    is_eos = is_label & (labels == trainer.processing_class.eos_token_id)
    assert 0.05 < logs["profit/kept_fraction"] < 0.95
    for name, expected in {
        "loss": loss,
        "profit/loss": loss,
        "profit/nll": -log_probs[is_label].mean(),
        "profit/kept_fraction": kept.sum() / is_label.sum(),
        "profit/kept_prob": probs[kept].mean(),
        "profit/dropped_prob": probs[dropped].mean(),
        "profit/eos_kept_rate": (kept & is_eos).sum() / is_eos.sum(),
    }.items():
        assert logs[name] == pytest.approx(expected.item(), rel=1e-5), name
    for name, weight in model.named_parameters():
        trained = trainer.model.get_parameter(name)
        torch.testing.assert_close(trained, weight - 0.05 * weight.grad, rtol=1e-4, atol=1e-6)


def test_threshold_zero_is_sft(student, config, data):
    off = run(student, config, data["prompt_completion"])
    on = run(student, config | {"profit_threshold": 0.0}, data["prompt_completion"])
    for entry, expected in zip(on.state.log_history[:2], off.state.log_history[:2], strict=True):
        assert {key: entry[key] for key in expected} == expected
        assert entry["profit/kept_fraction"] == 1 and "profit/dropped_prob" not in entry


def test_threshold_one_learns_nothing_and_says_so(student, config, data, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = run(student, config | {"profit_threshold": 1.0, "weight_decay": 0.0}, data["messages"])
    assert [entry["loss"] for entry in trainer.state.log_history[:2]] == [0, 0]
    assert "`profit_threshold: 1.0` has let no label pass" in caplog.text
    before = AutoModelForCausalLM.from_pretrained(student).state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


OPTIONS = {
    "full sequence": ("messages", {}),
    "assistant only": ("messages", {"assistant_only_loss": True}),
    "completion only": ("prompt_completion", {}),
    "packed": ("messages", {"packing": True, "max_length": 256}),
    "packed, wrapped": ("messages", {"packing": True, "packing_strategy": "wrapped", "max_length": 128}),
    "padding-free": ("messages", {"padding_free": True, "max_length": None}),
    "accumulation": ("messages", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "checkpointing": ("messages", {"gradient_checkpointing": True}),
    "bfloat16": ("messages", {"bf16": True}),
    "one process's tokens": ("messages", {"average_tokens_across_devices": False}),
}


@pytest.mark.parametrize(
    "flags", [{"profit_threshold": 1e-3}, {"profit_threshold": 1e-3, "profit_normalize": "sequence"}]
)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(student, config, data, option, flags):
    name, changes = OPTIONS[option]
    trainer = run(student, config | changes | flags, data[name])
    first, second = trainer.state.log_history[:2]
    assert 0 < first["profit/kept_fraction"] < 1
    for entry in (first, second):
        assert entry["loss"] == pytest.approx(entry["profit/loss"], rel=1e-4)
        assert entry["profit/loss"] < entry["profit/nll"]
        assert 0 < entry["grad_norm"] < float("inf")
    assert first["profit/kept_prob"] > 1e-3 >= first["profit/dropped_prob"]


@pytest.mark.parametrize("normalize", ["all", "sequence", "kept"])
def test_evaluation_loss_is_plain(student, config, data, normalize):
    """What is compared between runs must not depend on the gate; the gated loss stands beside it."""
    off = run(student, config | {"learning_rate": 0.0}, data["messages"], data["prompt_completion"]).evaluate()
    flags = {"learning_rate": 0.0, "profit_threshold": 1e-3, "profit_normalize": normalize}
    trainer = run(student, config | flags, data["messages"], data["prompt_completion"])
    on = trainer.evaluate()
    same = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    assert {key: on[key] for key in same} == {key: off[key] for key in same}
    # `eval_loss` averages over batches, this one over labels.
    assert on["eval_profit/nll"] == pytest.approx(on["eval_loss"], rel=0.02)
    assert 0 < on["eval_profit/loss"] < on["eval_profit/nll"]
    assert 0 <= on["eval_profit/eos_kept_rate"] <= 1
    assert trainer.evaluate()["eval_profit/nll"] == on["eval_profit/nll"]  # a second evaluation starts from nothing


def test_a_document_may_have_no_label(student, config):
    """Neither in a batch nor in a whole step: the loss is a finite zero, and `sequence` does not count it."""
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8, 9], "labels": [8, -100]}] * 2
    flags = {
        "profit_threshold": 0.0,
        "profit_normalize": "sequence",
        "max_steps": 2,
        "train_sampling_strategy": "sequential",
    }
    dataset = Dataset.from_list(rows)
    trainer = run(student, config | flags | {"per_device_train_batch_size": 1}, dataset)
    assert [entry["loss"] for entry in trainer.state.log_history[:2]][1] == 0
    both = run(student, config | flags | {"per_device_train_batch_size": 2}, dataset)
    assert both.state.log_history[0]["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)


def test_kept_needs_one_process(config, monkeypatch):
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    with pytest.raises(ValueError, match="`profit_normalize: kept` needs one process, and there are 2"):
        SFTConfig(**config, profit_threshold=0.1, profit_normalize="kept")


def test_trainer_refusals(student, config, data):
    args = SFTConfig(**config, profit_threshold=0.1)
    with pytest.raises(ValueError, match="`compute_loss_func` replaces the loss"):  # before it looks for the model
        SFTTrainer("no/such-model", args, train_dataset=data["messages"], compute_loss_func=lambda *_, **__: 0)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="does not support prompt-learning adapters.*Use LoRA"):
        SFTTrainer(str(student), args, train_dataset=data["messages"], peft_config=prompt)
