"""PTQTP through `from_pretrained` and `save_pretrained`."""

import pytest
import torch
from helpers.round_trips import INPUT, load, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_rb import PTQTPConfig
from hf_rb.quantizers.ptqtp import PTQTPLinear, solve


def test_weights_are_those_of_the_solver(make_model):
    source = make_model()
    model = load(source, PTQTPConfig())
    weight = load_file(source / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    expected = solve(weight)
    layer = model.model.layers[1].self_attn.o_proj
    assert torch.equal(layer.dequantize(), expected.dequantize())
    assert layer.weight_scale.shape == (192, 2, 2)  # 192 weights are one group and a half
    x = torch.randn(3, 192)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected.dequantize()), atol=1e-5, rtol=1e-5)


def test_layers_of_small_weights_are_counted(make_model, tmp_path):
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-3
    copy_model(source, tmp_path / "small", tensors)
    report = load(tmp_path / "small", PTQTPConfig()).hf_quantizer.report
    assert report.resolved == 1
    assert [layer.name for layer in report.layers if layer.resolved] == ["model.layers.0.mlp.up_proj"]
    assert load(tmp_path / "small", PTQTPConfig(tol_mode="absolute_strict")).hf_quantizer.report.resolved == 0


def copy_model(source, destination, tensors):
    destination.mkdir()
    (destination / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})


def test_queries_and_keys_may_stay(make_model, tmp_path):
    options = dict(modules_to_not_convert=["down_proj", "model.layers.1.self_attn"], quantize_qk=False)
    model = load(make_model(tied=False), PTQTPConfig(**options))
    quantized = {name for name, module in model.named_modules() if isinstance(module, PTQTPLinear)}
    assert quantized == {
        *(f"model.layers.0.self_attn.{name}_proj" for name in "vo"),
        *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up")),
    }
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_layers_that_transformers_keeps_in_float32(tmp_path):
    sizes = dict(
        d_model=64, d_ff=96, d_kv=16, num_layers=1, num_heads=4, vocab_size=64, feed_forward_proj="gated-gelu"
    )
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "source")
    load_t5 = AutoModelForSeq2SeqLM.from_pretrained
    model = load_t5(tmp_path / "source", quantization_config=PTQTPConfig(), dtype=torch.bfloat16)
    # Their input is cast to the type of their weight.
    assert [name.rpartition(".")[2] for name in model.hf_quantizer.report.skipped] == ["wo", "wo", "lm_head"]
    model.save_pretrained(tmp_path / "saved")
    inputs = dict(input_ids=INPUT, decoder_input_ids=INPUT)
    with torch.no_grad():
        assert torch.equal(load_t5(tmp_path / "saved")(**inputs).logits, model(**inputs).logits)


def test_rounded_activations(make_model, tmp_path):
    source = make_model(dtype=torch.float32)
    model = load(source, PTQTPConfig(activations="int8"))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).model.layers[0].mlp.up_proj.activations == "int8"
    # A default says nothing about what is stored.
    assert load(tmp_path, PTQTPConfig()).model.layers[0].mlp.up_proj.activations == "int8"
    exact = load(source, PTQTPConfig())
    exact.save_pretrained(tmp_path / "exact")
    again = load(tmp_path / "exact", PTQTPConfig(activations="int8"))  # may be chosen anew
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="`activations` cannot be 'int9'; did you mean 'int8'"):
        again.model.layers[0].mlp.up_proj.activations = "int9"
    for module in again.modules():
        if isinstance(module, PTQTPLinear):
            module.activations = "exact"
    assert torch.equal(logits(again), logits(exact))
    torch.testing.assert_close(logits(exact), logits(model), atol=0.2, rtol=0.05)


def test_compiled(make_model):
    model = load(make_model("llama"), PTQTPConfig(), dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(INPUT).logits, logits(model))


def test_checkpoints_of_a_trainer(make_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    def trainer(steps):
        model = load(make_model(), PTQTPConfig(), dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights="gaussian"))
        args = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True
        )
        rows = [{"input_ids": row, "labels": row} for row in INPUT.repeat(4, 1)]
        return Trainer(model, args, train_dataset=rows)

    trainer(2).train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert len(saved) == 28 and all("lora" in name for name in saved)
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    weight = resumed.model.base_model.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8 and weight.grad is None


# Refusals.


def test_no_qk_needs_them(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no q_proj"):
        load(tmp_path, PTQTPConfig(quantize_qk=False))
