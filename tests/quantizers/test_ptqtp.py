"""PTQTP through `from_pretrained` and `save_pretrained`."""

import copy
import filecmp
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rb import PTQTPConfig
from hf_rb.quantizers.ptqtp import PTQTPLinear, solve


INPUT = torch.arange(12).view(2, 6)


def load(folder, config=None, **kwargs):
    if config is not None:  # an explicit `None` would hide the one in the checkpoint
        kwargs["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model):
    return model(INPUT).logits


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (dict(architecture="qwen3", tied=True), dict()),
        (dict(architecture="qwen3", tied=False, bias=True), dict(packing="nibble")),
        (dict(architecture="llama", tied=True, bias=True), dict(packing="nibble", planes=1)),
        (dict(architecture="llama", tied=False), dict(planes_per_layer={"mlp.down_proj": 1}, group_size=64)),
        (dict(architecture="llama", dtype=torch.float32), dict(scale_mode="tied", tol_mode="relative")),
    ],
)
def test_round_trip(make_model, tmp_path, model, options):
    source = make_model(**model)
    quantized = load(source, PTQTPConfig(**options))
    expected = logits(quantized)
    quantized.save_pretrained(tmp_path / "one")
    loaded = load(tmp_path / "one")
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")

    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not model.get("tied", True)
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert down.dtype == torch.uint8 and down.shape != (192, 160)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.float16
    assert tensors["model.embed_tokens.weight"].dtype == model.get("dtype", torch.bfloat16)

    plain = load(tmp_path / "one", PTQTPConfig(dequantize=True))
    assert not any(isinstance(module, PTQTPLinear) for module in plain.modules())
    assert plain.dtype == loaded.dtype
    torch.testing.assert_close(logits(plain), expected, atol=0.05, rtol=0.05)  # its weights are rounded to bfloat16
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))

    assert torch.equal(logits(loaded.dequantize()), logits(plain))
    assert not any(isinstance(module, PTQTPLinear) for module in loaded.modules())


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


def test_report(make_model):
    report = load(make_model(), PTQTPConfig()).hf_quantizer.report
    assert len(report.layers) == 14 and report.skipped == ["lm_head"] and report.resolved == 0
    assert all(0.14 < layer.relative_error < 0.18 for layer in report.layers)
    assert set(report.error_by_kind()) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert report.weights_per_second > 0


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


def test_dict_config_and_other_dtypes(make_model, tmp_path):
    model = load(make_model(), {"quant_method": "ptqtp", "group_size": 64}, dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.layout.group_size == 64 and layer.weight_scale.dtype == torch.float16
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight_scale, layer.weight_scale)
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "weight_scale" in name)


def test_casting_the_model_keeps_the_scales(make_model):
    model = load(make_model(), PTQTPConfig(), dtype=torch.float32)
    scale = model.model.layers[0].mlp.up_proj.weight_scale.clone()
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float16
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight_scale, scale)
    assert logits(model).dtype == torch.bfloat16


def test_skipped_modules(make_model, tmp_path):
    options = dict(modules_to_not_convert=["down_proj", "model.layers.1.self_attn"], quantize_qk=False)
    model = load(make_model(tied=False), PTQTPConfig(**options))
    quantized = {name for name, module in model.named_modules() if isinstance(module, PTQTPLinear)}
    assert quantized == {
        *(f"model.layers.0.self_attn.{name}_proj" for name in "vo"),
        *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up")),
    }
    assert "lm_head" in model.hf_quantizer.report.skipped  # the default skips stay
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_device_map(make_model, tmp_path):
    model = load(make_model(), PTQTPConfig(), device_map="auto")
    # What `device_map` plans with: the parameters have their packed shapes before anything is loaded.
    weight = model.model.layers[0].mlp.up_proj.weight
    size = model.hf_quantizer.param_element_size(model, "model.layers.0.mlp.up_proj.weight", weight)
    assert size * weight.numel() == 160 * (64 + 32)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", device_map={"": "cpu"})), logits(model))


def test_gradients_reach_what_is_below_and_adapters(make_model):
    from peft import LoraConfig, get_peft_model

    model = load(make_model(), PTQTPConfig(), dtype=torch.float32)
    assert model.hf_quantizer.is_trainable
    packed = model.model.layers[0].mlp.up_proj.weight.clone()
    with torch.inference_mode():
        model(INPUT)  # what is kept from here must not stop training
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    model(INPUT, labels=INPUT).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len([name for name in trained if "lora_B" in name]) == 14
    assert all("lora" in name for name in trained)
    assert torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])  # with a kernel, and without
def test_a_layer_that_changes(make_model, dtype):
    layer = load(make_model(), PTQTPConfig()).model.layers[0].mlp.up_proj
    x = torch.randn(2, 192, dtype=dtype)
    first = layer(x)
    with torch.no_grad():
        layer.weight_scale *= 2
    torch.testing.assert_close(layer(x), 2 * first)
    layer.weight_scale.data = layer.weight_scale.data / 2
    assert torch.equal(layer(x), first)
    other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(other.to("cpu")(x), first)


# Refusals.


def test_bad_weights_are_named(make_model, tmp_path):
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("inf")
    copy_model(source, tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match="NaN or an infinite value") as error:
        load(tmp_path / "bad", PTQTPConfig())
    assert "model.layers.0.mlp.up_proj.weight" in str(error.value)
    assert "model.layers.1.self_attn.q_proj.weight" in str(error.value)


def test_weight_of_another_shape(make_model, tmp_path):
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(160, 128, dtype=torch.bfloat16)
    copy_model(source, tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match=r"up_proj.weight: .*\(160, 128\), expected \(160, 192\)"):
        load(tmp_path / "bad", PTQTPConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(group_size=0), r"`group_size` must be in \[1, inf\)"),
        (dict(planes=4), "`planes` .* must be one of 1, 2, 3"),
        (dict(tol=0.0), "`tol` must be in"),
        (dict(tol_mode="strict"), "`tol_mode` .* must be one of"),
        (dict(packing="base3"), "`packing` .* must be one of 'dense', 'nibble'"),
        (dict(planes_per_layer={"down_proj": 4}), "must be 1, 2 or 3; got 4"),
        (dict(planes=1, scale_mode="tied"), "use it with `planes=2`"),
        (dict(modules_to_not_convert="lm_head"), r"must be a list; got 'lm_head', so write \['lm_head'\]"),
        (dict(format_version=2), "Update hf_rb"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        PTQTPConfig(**options)


def test_misspelt_key(make_model):
    with pytest.raises(ValueError, match="no key 'group_sise'; did you mean 'group_size'"):
        load(make_model(), {"quant_method": "ptqtp", "group_sise": 64})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(modules_to_not_convert=["dwon_proj"]), "'dwon_proj' matches no module of Qwen3ForCausalLM"),
        (dict(planes_per_layer={"experts": 1}), "'experts' matches no module"),
        (dict(dequantize=True), "`dequantize=True` is for loading a PTQTP checkpoint"),
        (dict(modules_to_not_convert=["model"]), "no `nn.Linear` to quantize"),
    ],
)
def test_options_that_cannot_act(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        load(make_model(), PTQTPConfig(**options))


def test_no_qk_needs_them(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no q_proj"):
        load(tmp_path, PTQTPConfig(quantize_qk=False))


def test_loading_without_the_package_fails(make_model, tmp_path):
    load(make_model(), PTQTPConfig()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "ptqtp"
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r}); print('LOADED')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=300)
    assert run.returncode != 0 and "LOADED" not in run.stdout
    assert "Unknown quantization type, got ptqtp" in run.stderr and "RuntimeError" in run.stderr
