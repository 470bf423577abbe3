"""What a calibrated run of D²Quant says and refuses, and adapters on its result."""

import copy
import pickle
import re

import pytest
import torch
from helpers.round_trips import load, logits, same_files, train
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import OlmoConfig, OlmoForCausalLM, PhiConfig, PhiForCausalLM
from transformers.utils import logging

from hf_rb import D2QuantConfig
from hf_rb.cli import quantize as verb
from hf_rb.quantizers.d2quant.biases import set_bias
from hf_rb.quantizers.d2quant.calibrate import pipeline
from hf_rb.quantizers.d2quant.calibrate.block import Block
from hf_rb.quantizers.d2quant.calibrate.kept import LayerResult
from hf_rb.quantizers.d2quant.calibrate.placing import put_in_place
from hf_rb.quantizers.d2quant.format import code_bits, is_dual
from hf_rb.quantizers.d2quant.maths import gptq
from hf_rb.quantizers.packed.report import BlockReport, Report


TEXT = "".join(chr(32 + int(i)) for i in torch.randint(95, (400,), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(autouse=True)
def characters(monkeypatch):
    """A tokenizer for which every character is a token."""

    def tokens(texts, **_):
        return {"input_ids": [[ord(letter) % 96 for letter in text] for text in texts]}

    monkeypatch.setattr(pipeline, "load_tokenizer", lambda config, model: tokens)


@pytest.fixture(scope="module")
def source(make_model):
    return make_model("llama", dtype=torch.float32)


def config(**options):
    return D2QuantConfig(**dict(dataset=[TEXT], num_samples=4, seqlen=32, group_size=64) | options)


def test_more_damping_is_said(source, caplog):
    """Of 8 tokens no Hessian has full rank."""
    logging.enable_propagation()
    model = load(source, config(num_samples=1, seqlen=8, percdamp=1e-12))
    logging.disable_propagation()
    assert logits(model).isfinite().all()
    said = re.findall(r"The Hessian of (\S+), \S+, \S+ needed `percdamp=(\S+)`", caplog.text)
    assert said[0][0] == "model.layers.0.self_attn.q_proj" and float(said[0][1]) > 1e-12


def test_a_final_correction_needs_a_head(source):
    bare = load(source).model
    result = LayerResult(BlockReport("last"), final_shift=torch.ones(192))
    with pytest.raises(ValueError, match="LlamaModel has no head, so nothing reads the correction of its final norm"):
        put_in_place(bare, bare.norm, config(), result, None, None)


def test_blocks_without_a_measured_shift_are_not_compared():
    blocks = [
        BlockReport("none", 0.5),
        BlockReport("unmeasured", 0.5, shift_before=2.0),
        BlockReport("measured", 0.5, shift_before=2.0, shift_after=0.0, shift_expected=0.5),
    ]
    assert "to within 2.5e-01" in verb._blocks(Report("d2quant", blocks=blocks))[-1]
    assert len(verb._blocks(Report("d2quant", blocks=blocks[:2]))) == 1  # the table alone


def test_hessians_without_a_factor_are_named(source, monkeypatch):
    hessian = 9 * torch.ones(192, 192) - 8 * torch.eye(192)
    monkeypatch.setattr(gptq.InputStatistics, "hessian", property(lambda self: hessian))
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj, \S+k_proj, \S+v_proj: The Hessian has no Cholesky factor"
    ):
        load(source, config(backend="gptq", dac=False))


def test_the_mean_of_the_final_norm_is_reported(source):
    report = load(source, config()).hf_quantizer.report
    final = report.final_norm
    assert final.name == "model.norm" and final.shift_after < final.shift_before
    assert final.shift_after == pytest.approx(final.shift_expected, rel=1e-12)
    assert load(source, config(dac_final=False)).hf_quantizer.report.final_norm is None
    clipped = load(source, config(dac_clip=1e-3)).hf_quantizer.report
    for block in (*clipped.blocks, clipped.final_norm):  # less is taken back, which is also known
        assert block.shift_after == pytest.approx(block.shift_expected, rel=1e-12)
    assert clipped.blocks[0].shift_after > report.blocks[0].shift_after

    lines = verb._blocks(report)
    assert "model.norm" in lines[0] and float(lines[1].rpartition(" ")[2].rstrip(".")) < 1e-12
    # A parallel MLP does not read the attention: there is nothing to compare.
    assert len(verb._blocks(Report("d2quant", blocks=[BlockReport("layers.0", 0.1, 0.0, 0.0, 0.0)]))) == 1


def test_tokens_that_the_model_does_not_have(source):
    with pytest.raises(
        ValueError, match="token id 900, and the model's embeddings 96 rows: give the model's own `tokenizer`"
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "load_tokenizer", lambda *_: lambda texts, **_: {"input_ids": [[900] * 500]})
            load(source, config())


def test_a_correction_that_cannot_act_is_said(tmp_path, caplog):
    """Phi's MLP and attention read the same norm."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    PhiForCausalLM(PhiConfig(**sizes)).save_pretrained(tmp_path)
    logging.enable_propagation()
    model = load(tmp_path, config(rotate=False))
    logging.disable_propagation()
    assert "`dac=True` corrects nothing in 1 layers (model.layers.0, …): no linear layers of an MLP" in caplog.text
    assert model.config.quantization_config.bias_modules is None


def test_a_norm_without_a_weight_keeps_no_bias(tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    OlmoForCausalLM(OlmoConfig(**sizes)).save_pretrained(tmp_path)
    model = load(tmp_path, config(rotate=False, dac_mode="norm_bias"))
    folded = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "lm_head"]
    assert model.config.quantization_config.bias_modules == folded


def test_a_layer_that_stays_gets_no_biases(source):
    model = load(source, config(modules_to_not_convert=["model.layers.0"]))
    first = model.hf_quantizer.report.blocks[0]
    assert (first.hidden_error, first.shift_before, first.shift_after) == (0, 0, 0)
    biases = model.config.quantization_config.bias_modules
    assert len(biases) == 3 and not any(name.startswith("model.layers.0.") for name in biases)


def test_sensitive_layers_get_more_bits(source, tmp_path):
    model = load(source, config(bits_per_layer="nsds:3.0"))
    bits = {layer.name: layer.given for layer in model.hf_quantizer.report.allocation}
    assert sorted(bits.values()) == [2, 4]
    for name, given in bits.items():
        layout = model.get_submodule(f"{name}.mlp.down_proj").layout
        assert (code_bits(layout), is_dual(layout)) == (given, given == 2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("mode", ["fold", "norm_bias"])
@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
def test_the_error_is_that_of_the_model_that_comes_out(make_moe, source, architecture, mode):
    """Whatever is packed, absorbed and folded. Of the mixture the experts are left, and read the corrected norm if it is the norm."""
    options = dict(rotate=False, dac_mode=mode, group_size=16)
    if architecture == "deepseek_v3":
        source = make_moe(architecture, vocab_size=96)
        options |= dict(modules_to_not_convert=["experts"], dsq=False)
    model = load(source, config(**options), dtype=torch.float32)
    tokens = pipeline.calibration_tokens(config(), pipeline.load_tokenizer(None, None))
    outputs = []
    for one in (load(source, dtype=torch.float32), model):
        hook = one.model.layers[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
        with torch.no_grad():
            one(tokens)
        hook.remove()
    original, quantized = (output[0] if isinstance(output, tuple) else output for output in outputs)
    error = ((quantized - original).norm() / original.norm()).item()
    rounding = (
        2e-3 if model.config.quantization_config.dsq else 1e-5
    )  # absorbed scales are rounded to float16 once more
    assert model.hf_quantizer.report.blocks[-1].hidden_error == pytest.approx(error, rel=rounding)


@pytest.mark.parametrize("mode", ["fold", "norm_bias"])
def test_offloading_reaches_corrections(source, tmp_path, mode):
    model = load(source, config(dac_mode=mode))
    model.save_pretrained(tmp_path / "one")
    for memory in ("150KB", "1KB"):  # some layers on disk, all of them
        options = dict(device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload")
        offloaded = load(tmp_path / "one", **options)
        assert any(parameter.is_meta for parameter in offloaded.parameters())
        assert torch.equal(logits(offloaded), logits(model))
        offloaded.save_pretrained(tmp_path / memory)
        assert same_files(tmp_path / memory, tmp_path / "one")


def test_copies_of_norms_with_biases(source):
    model = load(source, config(dac_mode="norm_bias"))
    assert type(model.model.norm).__name__ == "LlamaRMSNormWithBias"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model)) and type(other.model.norm) is type(model.model.norm)


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(8, bias=False), torch.nn.RMSNorm(8), torch.nn.LayerNorm(8)])
def test_biases_count_once(norm):
    bias, inputs, new = torch.arange(8.0), torch.randn(3, 8), getattr(norm, "bias", None) is None
    before = norm(inputs)
    assert set_bias(norm, bias) is new
    torch.testing.assert_close(norm(inputs), before + bias)


def test_a_layer_gets_its_types_back():
    layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    layer.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))
    layer.register_buffer("frequencies", torch.ones(1))
    before = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    block = Block("layers.0", layer, {})
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float32}
    block.close()
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == before


def test_adapters_on_a_calibrated_model(source, tmp_path):
    load(source, config(dac_final=False)).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    packed = {name: tensor.clone() for name, tensor in model.named_parameters() if "weight_" in name or "bias" in name}
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights="gaussian"))
    losses = train(adapted, 4)
    assert losses[-1] < losses[0] - 0.1
    after = {name.replace(".base_layer", ""): tensor for name, tensor in adapted.base_model.model.named_parameters()}
    assert any("bias" in name for name in packed)
    assert all(torch.equal(after[name], tensor) for name, tensor in packed.items())
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    with pytest.raises(ValueError, match="dequantize first"):
        again.merge_and_unload()
    again.dequantize()
    torch.testing.assert_close(logits(again.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)
