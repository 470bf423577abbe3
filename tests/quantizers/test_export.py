"""Dequantized folders and GPTQ exports."""

import json
import re

import pytest
import torch
from helpers.checkpoints import (
    SIZES,
    assert_same,
    experts,
    fused_experts,
    qwen3,
    square_transposed_experts,
    tensors,
    untied_with_biases,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_rb import PTQTPConfig
from hf_rb.cli import main
from hf_rb.quantizers import dequantize_checkpoint, export_gptq, quantize_checkpoint


IDS = torch.arange(24)[None]


def make_quantized(folder, make=qwen3, **config):
    torch.manual_seed(2)
    make(folder / "source")
    quantize_checkpoint(folder / "source", folder / "quantized", PTQTPConfig(**config), dtype="bfloat16")
    return folder / "quantized"


@pytest.mark.parametrize(
    ("make", "config", "dtype"),
    [
        (qwen3, {}, None),
        (qwen3, {"packing": "nibble", "planes": 1}, "float32"),
        (untied_with_biases, {"planes_per_layer": {"o_proj": 1}, "group_size": 64}, "float16"),
        (experts, {}, None),
        (fused_experts, {"packing": "nibble"}, None),
        (square_transposed_experts, {}, "float32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_dequantized_folder(tmp_path, make, config, dtype):
    folder = make_quantized(tmp_path, make, **config)
    size = dequantize_checkpoint(folder, tmp_path / "plain", dtype=dtype)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "plain"), "quantization_config")
    assert size.quantized_weights == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == getattr(torch, dtype or "bfloat16") and not hasattr(plain, "hf_quantizer")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "import hf_rb" not in card and 'pip install "transformers>=' in card
    # The same tensors as loading the quantized model into ordinary layers.
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=PTQTPConfig(dequantize=True), dtype=dtype or "auto"
    )
    loaded.save_pretrained(tmp_path / "loaded")
    assert_same(tmp_path / "plain", tmp_path / "loaded")
    assert torch.equal(plain(IDS).logits, loaded(IDS).logits)


def gptq_weight(stored, name, group_size):
    """Reads a layer as GPTQ's loaders do: version 1 of the format, whose zero points are one less than they are."""
    words, zeros, scales, groups = (stored[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = len(groups), scales.shape[1]
    assert words.dtype == zeros.dtype == groups.dtype == torch.int32 and scales.dtype == torch.float16
    assert words.shape == (inputs // 8, outputs) and zeros.shape == (-(-inputs // group_size), outputs // 8)
    assert len(scales) == len(zeros) and groups.tolist() == [i // group_size for i in range(inputs)]
    weight = torch.empty(outputs, inputs)
    for i in range(inputs):
        codes = (words[i // 8] >> 4 * (i % 8)) & 15
        group = groups[i].item()
        shifts = 4 * (torch.arange(outputs) % 8)
        zero_points = ((zeros[group].repeat_interleave(8) >> shifts) & 15) + 1
        assert (zero_points == 8).all()  # what symmetric kernels take for granted
        weight[:, i] = scales[group].float() * (codes - zero_points)
    return weight


@pytest.mark.parametrize("packing", ["dense", "nibble"])
def test_gptq(tmp_path, packing, caplog):
    folder = make_quantized(tmp_path, untied_with_biases, scale_mode="tied", packing=packing)
    export_gptq(folder, tmp_path / "gptq")
    assert "end in a group shorter than 128" in caplog.text  # 192 inputs
    stored = tensors(tmp_path / "gptq")
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    names = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    assert len(names) == 7
    for name in names:
        weight = gptq_weight(stored, name, 128)
        # In float32 the product of a float16 scale and a small integer is exact.
        assert torch.equal(weight, quantized.get_submodule(name).dequantize(torch.float32))
        model.get_submodule(name).weight.data = weight
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in names:
            parameter.data = stored[name].float()
    expected = quantized(IDS).logits
    assert (model(IDS).logits - expected).abs().max() < 1e-3 * expected.std()

    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq" and config["bits"] == 4 and config["sym"] and not config["desc_act"]
    assert config["checkpoint_format"] == "gptq" and "dynamic" not in config
    assert not [name for name in stored if name.endswith(("_scale", "proj.weight"))]


def test_gptq_names_the_layers_that_are_not_quantized(tmp_path):
    folder = make_quantized(tmp_path, scale_mode="tied", quantize_qk=False, group_size=64)
    export_gptq(folder, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    (inside,) = config["modules_in_block_to_quantize"]
    assert inside == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj"]
    patterns = [pattern.removeprefix("-:") for pattern in config["dynamic"]]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "source"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            kept = any(re.match(pattern, name) for pattern in patterns)
            assert kept == name.endswith(("q_proj", "k_proj")) and kept != name.endswith(tuple(inside))


def test_free_scales_are_refused(tmp_path, capsys):
    folder = make_quantized(tmp_path)
    assert main(["export", str(folder), str(tmp_path / "gptq")]) == 2
    message = capsys.readouterr().err
    assert 'scale_mode="tied"' in message and "hf-rb dequantize" in message
    assert not (tmp_path / "gptq").exists()


@pytest.mark.parametrize("make", [experts, fused_experts])
def test_experts_are_refused(tmp_path, make):
    folder = make_quantized(tmp_path, make, scale_mode="tied")
    with pytest.raises(ValueError, match="belongs to a mixture of experts.*`hf-rb dequantize`"):
        export_gptq(folder, tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    def narrow(folder):
        Qwen3ForCausalLM(Qwen3Config(**SIZES | {"intermediate_size": 100})).save_pretrained(folder)

    folder = make_quantized(tmp_path, narrow, scale_mode="tied")
    with pytest.raises(ValueError, match="is 192 x 100; GPTQ packs 8 codes|is 100 x 192; GPTQ packs 8 codes"):
        export_gptq(folder, tmp_path / "gptq")


def test_verbs(tmp_path, capsys):
    folder = make_quantized(tmp_path, scale_mode="tied")
    (folder / "README.md").write_text("Made from `first` by [`hf_rb`](https://github.com/hf-rb/hf_rb).\n")
    assert main(["dequantize", str(folder), str(tmp_path / "plain"), "--dtype", "float16"]) == 0
    assert "16." in capsys.readouterr().out
    card = (tmp_path / "plain/README.md").read_text()
    assert f"Made from `{folder.name}`" in card and "the values that quantizing `first` with PTQTP has left" in card
    assert main(["export", str(folder), str(tmp_path / "gptq"), "--format", "gptq"]) == 0
    said = capsys.readouterr().out
    assert "bits per weight" in said and "where `optimum` and `gptqmodel` are installed" in said and "vLLM" not in said
    card = (tmp_path / "gptq/README.md").read_text()
    assert ModelCard(card).data.tags == ["hf_rb", "ptqtp", "gptq", "4-bit"] and "tied ternary planes of PTQTP" in card
    assert '"optimum>=2.3" "gptqmodel>=7.7"\n' in card and "import hf_rb" not in card
    assert "the values that quantizing `first` with PTQTP has left" in card
    assert main(["dequantize", str(folder), str(tmp_path / "plain")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["dequantize", str(tmp_path / "source"), str(tmp_path / "other")]) == 2
    assert "is not quantized" in capsys.readouterr().err


@pytest.mark.parametrize("write", [dequantize_checkpoint, export_gptq])
def test_refuses_to_replace_its_source(tmp_path, write):
    folder = make_quantized(tmp_path, scale_mode="tied")
    before = tensors(folder)
    for destination in (folder, folder.parent):
        with pytest.raises(ValueError, match="holds the model that the result is made from"):
            write(folder, destination, overwrite=True)
    assert tensors(folder).keys() == before.keys()


@pytest.mark.parametrize("write", [dequantize_checkpoint, export_gptq])
@pytest.mark.parametrize(
    ("make", "lost", "message"),
    [
        (
            qwen3,
            ["mlp.up_proj.weight"],
            "holds 0 of the 30,720 weights of model.layers.0.mlp.up_proj.weight; .*scales",
        ),
        (qwen3, ["mlp.up_proj.weight", "mlp.up_proj.weight_scale"], "holds 0 of the 30,720 weights"),
        (qwen3, ["mlp.up_proj.weight_scale"], "has model.layers.0.mlp.up_proj.weight, but no model.*weight_scale"),
        (experts, ["mlp.experts.1.up_proj.weight"], r"experts.gate_up_proj; .*experts.1.up_proj.weight is missing"),
    ],
)
def test_missing_tensors_are_named(tmp_path, write, make, lost, message):
    folder = make_quantized(tmp_path, make, scale_mode="tied")
    names = {f"model.layers.0.{name}" for name in lost}
    for file in folder.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(file).items() if name not in names}
        save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        write(folder, tmp_path / "written")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors["weight"][0, :2].fill_(250), "code 250, 'dense' ends at 242"),
        (lambda tensors: tensors["weight_scale"][0, 0].fill_(torch.nan), "negative, infinite or NaN"),
        (lambda tensors: tensors.pop("weight_scale"), "weight_scale"),
        (lambda tensors: tensors.update(weight=tensors["weight"][:, :-1].contiguous()), "Expected uint8 rows"),
    ],
)
def test_damaged_tensors_are_named(tmp_path, damage, message):
    folder = make_quantized(tmp_path)
    module = "model.layers.0.self_attn.o_proj"
    (file,) = (file for file in folder.glob("*.safetensors") if f"{module}.weight" in load_file(file))
    stored = load_file(file)
    layer = {key: stored.pop(f"{module}.{key}") for key in ("weight", "weight_scale")}
    damage(layer)
    save_file(stored | {f"{module}.{key}": tensor for key, tensor in layer.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{module}.*{message}"):
        dequantize_checkpoint(folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
