"""MPI routers through the real trainers, with adapters, and quantized after folding."""

import json

import pytest
import torch
from datasets import Dataset
from helpers.mixtures import mixture
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from hf_rb import (
    MPIQwen3MoeForCausalLM,
    PTQTPConfig,
    SFTConfig,
    SFTTrainer,
    tiny,
)
from hf_rb.cli import main
from hf_rb.io.resources import resource_folder
from hf_rb.models.mpi import fold_mpi
from hf_rb.models.mpi.conversion import routers
from hf_rb.report import make_report, read_source
from hf_rb.scripts import sft
from hf_rb.trainers.common.routers import add_router_doctor


RECIPES = resource_folder("recipes") / "mpi"
RUN = dict(
    use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1, per_device_train_batch_size=4, logging_steps=1,
    save_strategy="no", report_to="none", disable_tqdm=True, max_length=96, seed=1,
)  # fmt: skip


def rows(size=4):
    return tiny.load_dataset("math", config="prompt_completion", size=size).select_columns(["prompt", "completion"])


def train_sft(model, tokenizer, folder, data=None, **fields):
    args = SFTConfig(str(folder), **RUN | fields)
    trainer = SFTTrainer(model, args=args, train_dataset=data or rows(), processing_class=tokenizer)
    trainer.train()
    return trainer


def test_a_run_is_saved_resumed_and_folded(tokenizer, tmp_path):
    model = mixture()
    options = dict(save_strategy="steps", save_steps=1, max_steps=2, learning_rate=1e-3)
    trainer = train_sft(model, tokenizer, tmp_path, data=rows(8), **options)
    again = SFTTrainer(
        mixture(seed=3), args=SFTConfig(str(tmp_path), **RUN | options | {"max_steps": 3}), train_dataset=rows(8),
        processing_class=tokenizer,
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Manifold Power Iteration" in card and "without this line, loading fails" in card

    folder = tmp_path / "folded"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        fold_mpi(model).save_pretrained(folder)
        native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert type(native) is Qwen3MoeForCausalLM and torch.equal(native(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def test_a_trainer_takes_the_path_of_a_checkpoint(tokenizer, tmp_path):
    mixture().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    trainer = train_sft(str(tmp_path / "start"), None, tmp_path / "run")
    assert isinstance(trainer.model, MPIQwen3MoeForCausalLM)
    assert json.loads((tmp_path / "start" / "config.json").read_text())["model_type"] == "mpi_qwen3_moe"


def test_routers_see_lora_on_experts_and_fold_after_merging(tokenizer, tmp_path):
    model = mixture()
    before = [layer.weight().detach().clone() for layer in routers(model)]
    lora = LoraConfig(
        r=4, lora_alpha=16, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False
    )
    args = SFTConfig(str(tmp_path), learning_rate=1e-2, **RUN)
    trainer = SFTTrainer(model, args=args, train_dataset=rows(), processing_class=tokenizer, peft_config=lora)
    trainer.train()
    adapted = trainer.model.eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapted(ids).logits
        moved = [layer.weight() for layer in routers(adapted)]
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(before, moved, strict=True))
        with pytest.raises(ValueError, match="merge it first"):
            fold_mpi(adapted)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fold_mpi(merged)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_quantization_comes_after_folding(tokenizer, tmp_path):
    sizes = dict(hidden_size=128, moe_intermediate_size=128, head_dim=64)
    model = mixture(**sizes).eval()
    routed = [layer.weight().detach().clone() for layer in routers(model)]
    model.save_pretrained(tmp_path / "mpi")
    fold_mpi(model).save_pretrained(tmp_path / "folded")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", quantization_config=PTQTPConfig())
    for layer, weight in zip(routers(quantized), routed, strict=True):
        torch.testing.assert_close(layer.learned.detach(), weight)  # the routers are what they were before
    ids = torch.tensor([[5, 6, 7, 8]])
    assert quantized(ids).logits.isfinite().all()
    with pytest.raises((TypeError, ValueError), match="fold"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mpi", quantization_config=PTQTPConfig())(ids)


def test_a_step_on_rows_without_a_chat_template(tokenizer, tmp_path):
    data = Dataset.from_dict({"text": ["one two three four five six"] * 4})
    trainer = train_sft(mixture(), tokenizer, tmp_path, data=data)
    assert trainer.state.log_history[0]["loss"] > 0


def test_the_recipes_and_what_the_doctor_logs_of_them(tmp_path, monkeypatch):
    """The two commands of the recipes, and the map of `hf-rb report`."""
    monkeypatch.chdir(tmp_path)
    assert main(["upcycle", "--config", str(RECIPES / "tiny-cpu.yaml")]) == 0
    recipe = ["--config", str(RECIPES / "tiny-cpu-sft.yaml"), "--max_steps", "2", "--logging_steps", "1"]
    sft.main([*recipe, "--router_doctor", "layers"])
    log = json.loads((tmp_path / "outputs/mpi-tiny/trainer_state.json").read_text())["log_history"]
    assert {"router/max_vio", "router/dead", "router/lambda_effective", "router/model.layers.0.mlp/max_vio"} <= log[
        1
    ].keys()
    report = make_report([read_source("outputs/mpi-tiny")])
    assert "MaxVio of every layer at 2 logs" in report.markdown()


def test_a_doctor_for_a_dense_model_is_refused(tokenizer, tmp_path):
    model = mixture(mlp_only_layers=[0, 1])
    trainer = SFTTrainer(model, args=SFTConfig(str(tmp_path), **RUN), train_dataset=rows(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="`router_doctor` looks at the routers .* has none"):
        add_router_doctor(trainer)
