"""D²Quant through `from_pretrained` and `save_pretrained`, tensor by tensor, below adapters and back to ordinary layers."""

import copy
import json
import pickle

import pytest
import torch
from helpers.checkpoints import (
    SIZES,
    assert_same,
    experts,
    qwen3,
    tensors,
)
from helpers.round_trips import INPUT, load, logits, same_files, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from hf_rb import D2QuantConfig, tiny
from hf_rb.cli import main
from hf_rb.quantizers import dequantize_checkpoint, export_gptq, quantize_checkpoint
from hf_rb.quantizers.d2quant import D2QuantLinear
from hf_rb.quantizers.d2quant.calibrate import pipeline
from hf_rb.quantizers.d2quant.format import is_dual


def rtn(**options):
    return D2QuantConfig(backend="rtn", dac=False, rotate=False, **options)


def back():
    return rtn(dequantize=True)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, D2QuantLinear)}


def test_bits_of_layers(make_model):
    options = dict(bits_per_layer={"o_proj": 4, "layers.1.mlp.down_proj": 3})
    found = layers(load(make_model(), rtn(**options)))
    bits = {
        name: (sum(part.bits for part in layer.layout.parts), is_dual(layer.layout)) for name, layer in found.items()
    }
    assert bits["model.layers.0.self_attn.o_proj"] == (4, False)
    assert bits["model.layers.0.mlp.down_proj"] == (2, True) and bits["model.layers.1.mlp.down_proj"] == (3, True)
    assert bits["model.layers.0.mlp.up_proj"] == (2, False)


def test_weights_are_those_of_the_rounding(make_model):
    from hf_rb.quantizers.d2quant.maths import dsq, grids

    source = make_model(dtype=torch.float32)
    weights, layer = load_file(source / "model.safetensors"), load(source, rtn()).model.layers[1]
    codes = grids.round_to_nearest(weights["model.layers.1.self_attn.o_proj.weight"], 2)
    assert torch.equal(layer.self_attn.o_proj.dequantize(), codes.dequantize())
    down = dsq.round_to_nearest(weights["model.layers.1.mlp.down_proj.weight"], 2)
    assert torch.equal(layer.mlp.down_proj.dequantize(), down.planes())
    up = grids.round_to_nearest(weights["model.layers.1.mlp.up_proj.weight"], 2)
    expected = up.dequantize() * down.column_scale[:, None]
    assert (layer.mlp.up_proj.dequantize() - expected).norm() < 5e-4 * expected.norm()


def test_sign_planes_lose_less(make_model):
    errors = load(make_model(), rtn()).hf_quantizer.report.error_by_kind()
    assert errors["down_proj"] < errors["up_proj"]


# Tensor by tensor.


def smaller_neuron(folder, factor=0.0):
    """As a pruned model has it, or one that was padded."""
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    model.model.layers[0].mlp.down_proj.weight.data[:, 7] *= factor
    model.save_pretrained(folder)


def test_columns_of_any_size(tmp_path):
    """A column of zeros is absorbed; one that is nearly zero stays, which only the model as a whole can have."""
    smaller_neuron(tmp_path / "pruned")
    model = load(tmp_path / "pruned", rtn())
    assert model.config.quantization_config.column_modules is None
    assert not model.model.layers[0].mlp.up_proj.dequantize()[7].any()
    smaller_neuron(tmp_path / "small", 1e-5)
    model = load(tmp_path / "small", rtn())
    assert model.config.quantization_config.column_modules == ["model.layers.0.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"up_proj.* out of the range .* stay with model.layers.0.mlp.down_proj"):
        quantize_checkpoint(tmp_path / "small", tmp_path / "out", rtn())


def test_streaming_in_any_order(tmp_path, monkeypatch):
    # Up before down, and in another process: whoever comes first solves the down projection.
    from hf_rb.quantizers.d2quant import D2QuantQuantizer
    from hf_rb.quantizers.folders import stream as streaming

    torch.manual_seed(1)
    experts(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "expected", rtn())
    quantize_tensor, calls = D2QuantQuantizer.quantize_tensor, []

    def forgetful(self, *args):
        calls.append(args[0])
        self.columns.known.clear()
        if len(calls) == 9:
            raise KeyboardInterrupt
        return quantize_tensor(self, *args)

    monkeypatch.setattr(D2QuantQuantizer, "quantize_tensor", forgetful)
    monkeypatch.setattr(streaming, "PART", 1)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", rtn())
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", rtn())
    assert len(calls) == 9 + 16 - 8
    assert_same(tmp_path / "out", tmp_path / "expected")


def test_calibration_cannot_be_streamed(tmp_path):
    qwen3(tmp_path / "source")
    with pytest.raises(ValueError, match=r"runs the model on text, so it cannot be streamed.*`backend='rtn'`"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", D2QuantConfig(dataset=["text"]))


# Calibrated.


@pytest.fixture(scope="module")
def calibrated():
    config = D2QuantConfig(dataset="tiny:math", num_samples=4, seqlen=64)
    return load(tiny.resolve("tiny:student"), config, dtype=torch.float32)


def test_calibrated_round_trip(calibrated, tmp_path):
    expected = logits(calibrated)
    calibrated.save_pretrained(tmp_path / "one")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "model.layers.0.mlp.up_proj" in stored["quantization_config"]["bias_modules"]
    assert stored["quantization_config"]["column_modules"] is None and not stored["tie_word_embeddings"]
    loaded = load(tmp_path / "one")
    assert torch.equal(logits(loaded), expected)
    assert loaded.model.layers[0].mlp.up_proj.bias is not None
    loaded.save_pretrained(tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")
    plain = load(tmp_path / "one", back())
    torch.testing.assert_close(logits(plain), expected, atol=1e-3, rtol=1e-3)
    headless = AutoModel.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        assert torch.equal(headless(INPUT).last_hidden_state, calibrated.model(INPUT).last_hidden_state)


def test_corrections_have_no_place_in_an_ordinary_model(calibrated, tmp_path, caplog, capsys):
    calibrated.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"corrections as biases of \d+ modules \(.*or quantize with `dac=False`"):
        dequantize_checkpoint(tmp_path / "model", tmp_path / "plain")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "gptq")]) == 2
    assert "quantized with D²Quant, whose sign planes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Write an ordinary model with `hf-rb dequantize`"):
        export_gptq(tmp_path / "model", tmp_path / "gptq")
    logging.enable_propagation()
    load(tmp_path / "model").dequantize()
    logging.disable_propagation()
    assert "corrections of this model stay in biases" in caplog.text


def test_corrections_of_a_llama_have_a_place(make_model, tmp_path, monkeypatch, caplog):
    """Llama's configuration can give biases to the MLP, which is all that reads the corrected norms without the final one."""

    class Tokens:
        def __call__(self, texts, **_):
            return {"input_ids": [[ord(letter) % 96 for letter in text] for text in texts]}

    monkeypatch.setattr(pipeline, "load_tokenizer", lambda config, model: Tokens())
    options = dict(
        dataset=["".join(chr(i * i % 90 + 32) for i in range(200))], num_samples=4, seqlen=32, group_size=64
    )
    source = make_model("llama", tied=False, dtype=torch.float32)
    model = load(source, D2QuantConfig(dac_final=False, **options))
    expected = logits(model)
    model.save_pretrained(tmp_path / "one")
    dequantize_checkpoint(tmp_path / "one", tmp_path / "folder")
    stored = tensors(tmp_path / "folder")
    assert stored["model.layers.0.mlp.up_proj.bias"].any() and not stored["model.layers.0.mlp.down_proj.bias"].any()
    caplog.clear()
    logging.enable_propagation()
    load(tmp_path / "one", back()).save_pretrained(tmp_path / "plain")
    model.dequantize()
    model.save_pretrained(tmp_path / "memory")
    logging.disable_propagation()
    assert not caplog.text
    for name in ("folder", "plain", "memory"):
        torch.testing.assert_close(logits(load(tmp_path / name)), expected, atol=1e-4, rtol=1e-4)
        assert json.loads((tmp_path / name / "config.json").read_text())["mlp_bias"] is True

    load(source, D2QuantConfig(**options)).save_pretrained(tmp_path / "final")
    with pytest.raises(
        ValueError, match=r"\(lm_head, …\), for which an ordinary llama .* quantize with `dac_final=False`"
    ):
        dequantize_checkpoint(tmp_path / "final", tmp_path / "no")


def test_a_missing_bias_is_named(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = [name for name in stored if name.endswith(("up_proj.bias", "lm_head.bias"))]
    for name in names:
        del stored[name]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert len(names) > 1 and all(f"{name}: not in the checkpoint" in str(error.value) for name in names)


# As a model among others.


def test_copies_offloading_and_generation(make_model, tmp_path):
    source = make_model("llama", tied=False, dtype=torch.float32)
    model = load(source, rtn(bits=3, modules_to_not_convert=["up_proj"]))
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
    model.save_pretrained(tmp_path / "one")
    for memory in ("150KB", "1KB"):  # some layers on disk, all of them
        options = dict(device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload")
        offloaded = load(tmp_path / "one", **options)
        assert any(parameter.is_meta for parameter in offloaded.parameters())
        assert torch.equal(logits(offloaded), expected)
        offloaded.save_pretrained(tmp_path / memory)
        assert same_files(tmp_path / memory, tmp_path / "one")
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(INPUT, **options), model.generate(INPUT, use_cache=False, **options))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected)


def test_quantizing_with_offloading_keeps_what_it_cannot_reach(make_model, tmp_path):
    source = make_model("llama", tied=False, dtype=torch.float32)
    options = dict(device_map="auto", max_memory={"cpu": "1KB"}, offload_folder=tmp_path / "offload")
    model = load(source, rtn(), **options)
    expected = logits(model)
    model.save_pretrained(tmp_path / "one")
    assert len(model.config.quantization_config.column_modules) == 2
    assert torch.equal(logits(load(tmp_path / "one")), expected)


def test_adapters(make_model):
    model = load(make_model(dtype=torch.float32), rtn(modules_to_not_convert=["layers.0.mlp.up_proj"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights="gaussian"))
    losses = train(adapted, 4)
    assert losses[-1] < losses[0] - 0.1
    after = {name: tensor for name, tensor in adapted.state_dict().items() if tensor.dtype == torch.uint8}
    assert all(torch.equal(*pair) for pair in zip(before.values(), after.values(), strict=True))
    expected = logits(adapted)
    with pytest.raises(ValueError, match="dequantize first"):
        adapted.merge_and_unload()
    adapted.dequantize()
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


# Refusals.


def test_gelu_keeps_its_column_scales(tmp_path, caplog):
    sizes = dict(hidden_size=64, ffn_dim=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    config = OPTConfig(**sizes, word_embed_proj_dim=64, activation_function="gelu")
    OPTForCausalLM(config).save_pretrained(tmp_path / "source")
    logging.enable_propagation()
    model = load(tmp_path / "source", rtn())
    logging.disable_propagation()
    assert "column scales of 2 down projections stay" in caplog.text and "(GELUActivation)" in caplog.text
    kept = model.config.quantization_config.column_modules
    assert kept == [f"model.decoder.layers.{i}.fc2" for i in range(2)]
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_report_counts_the_bytes_that_are_stored(tmp_path):
    assert SIZES["hidden_size"] == 192  # a group and a half
    torch.manual_seed(1)
    qwen3(tmp_path / "source")
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "out", rtn())
    stored = tensors(tmp_path / "out")
    ours = sum(tensor.nbytes for name, tensor in stored.items() if "proj" in name)
    weights = sum(tensor.numel() for name, tensor in tensors(tmp_path / "source").items() if "proj" in name)
    assert report.quantized_bits_per_weight == pytest.approx(8 * ours / weights)
