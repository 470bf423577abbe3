"""Fused experts: five architectures through `from_pretrained` and `save_pretrained`."""

import shutil

import pytest
import torch
from helpers.mixtures import MOE, MOE_SIZES
from helpers.round_trips import INPUT, load, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging

from hf_rb import PTQTPConfig, tiny
from hf_rb.quantizers.ptqtp import PTQTPLinear, solve
from hf_rb.quantizers.ptqtp.layers import PTQTPExperts


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, PTQTPExperts)]


def test_embedded_model(tmp_path):
    quantized = load(tiny.resolve("tiny:moe"), PTQTPConfig(), dtype=torch.float32)
    assert experts_of(quantized) and quantized.hf_quantizer.report.skipped == ["lm_head"]
    quantized.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(quantized))


def test_an_expert_is_solved_on_its_own(make_moe):
    source = make_moe("qwen3_moe")
    weights = load_file(source / "model.safetensors")
    experts = load(source, PTQTPConfig()).model.layers[1].mlp.experts
    for half, name in enumerate(("gate_proj", "up_proj")):
        expected = solve(weights[f"model.layers.1.mlp.experts.2.{name}.weight"]).dequantize()
        assert torch.equal(experts.unpacked("gate_up_proj")[2].chunk(2)[half], expected)


def test_names_of_the_model(make_moe, tmp_path):
    model = load(make_moe("qwen3_moe"), PTQTPConfig(), dtype=torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj_scale" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_file_that_has_its_experts_transposed(tmp_path):
    text = (
        MOE_SIZES
        | MOE["qwen3_moe"]
        | dict(num_hidden_layers=1, vocab_size=64, rope_scaling={"mrope_section": [8, 8, 8]})
    )
    vision = dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=192, patch_size=4)
    vision |= dict(spatial_merge_size=1, deepstack_visual_indexes=[0], num_position_embeddings=16)
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    for name in tensors:
        if "experts" in name:
            tensors[name] = tensors[name].mT.contiguous()  # as the published checkpoints are
    write(tmp_path / "one", tmp_path / "two", tensors)
    one, two = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, quantization_config=PTQTPConfig())
        for name in ("one", "two")
    )
    assert torch.equal(logits(one), logits(two)) and len(experts_of(one)) == 1
    # Only the language model of a multimodal one is quantized.
    packed = [name for name, module in one.named_modules() if isinstance(module, (PTQTPLinear, PTQTPExperts))]
    assert len(packed) == 5 and all("language_model" in name for name in packed)
    two.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(one))


def test_unknown_experts(make_moe, tmp_path, caplog):
    sizes = dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size=80, intermediate_size_mlp=96)
    source = make_moe("llama4_text", **sizes)
    logging.enable_propagation()
    model = load(source, PTQTPConfig())
    logging.disable_propagation()
    assert "leaves 0.4M weights of Llama4ForCausalLM as they are" in caplog.text and "Llama4TextExperts" in caplog.text
    skipped = model.hf_quantizer.report.skipped
    assert {"model.layers.1.feed_forward.experts.down_proj", "model.layers.1.feed_forward.router"} <= set(skipped)
    assert not any("router" in layer.name or ".experts." in layer.name for layer in model.hf_quantizer.report.layers)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_routers_stay(make_moe):
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=80, shared_expert_intermediate_size=96)
    model = load(make_moe("qwen2_moe", **sizes, intermediate_size=80), PTQTPConfig())
    assert [type(module) for name, module in model.named_modules() if name.endswith("shared_expert_gate")] == [
        nn.Linear
    ] * 2
    assert isinstance(model.model.layers[0].mlp.shared_expert.down_proj, PTQTPLinear)


@pytest.mark.slow
def test_compiled(make_moe):
    model = load(make_moe("qwen3_moe", num_hidden_layers=1), PTQTPConfig(), dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        assert torch.equal(model.generate(INPUT, **options), model.generate(INPUT, use_cache=False, **options))


def test_index_of_no_expert(make_moe):
    experts = load(make_moe("qwen3_moe"), PTQTPConfig(), dtype=torch.float32).model.layers[0].mlp.experts
    states, weights = torch.randn(3, 192), torch.rand(3, 2)
    index = torch.tensor([[0, 1], [2, 4], [4, 4]])
    output = experts(states, index, weights)
    assert torch.equal(output[2], torch.zeros(192))
    weights[1, 1] = 0
    torch.testing.assert_close(output[:2], experts(states[:2], index[:2].clamp(max=3), weights[:2]))


# Damaged files.


def code(tensors, name):
    tensors[f"{name}.weight"][3, 4] = 250


def width(tensors, name):
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, 1:].contiguous()


def scale(tensors, name):
    tensors[f"{name}.weight_scale"][5, 0, 0] = float("nan")


def missing(tensors, name):
    del tensors[f"{name}.weight"]


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            code,
            r"mlp.experts.down_proj: (expert 2|mlp.experts.2.down_proj.weight): A packed weight holds the code 250",
        ),
        (
            width,
            r"mlp.experts.down_proj: mlp.experts.2.down_proj.weight has shape \(192, 15\), its neighbours have \(192, 16\)",
        ),
        (
            scale,
            r"mlp.experts.down_proj(_scale|: mlp.experts.2.down_proj.weight): A scale is negative, infinite or NaN",
        ),
        (
            missing,
            r"mlp.experts.down_proj: (The checkpoint's weight has shape \(3,|The checkpoint has 3 tensors mlp.experts.*down_proj.weight and 4 tensors)",
        ),
    ],
)
def test_damaged_experts(make_moe, tmp_path, damage, message, dequantize):
    load(make_moe("qwen3_moe", num_hidden_layers=1), PTQTPConfig(planes=1)).save_pretrained(tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "model.safetensors")
    damage(tensors, "model.layers.0.mlp.experts.2.down_proj")
    write(tmp_path / "good", tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad", PTQTPConfig(dequantize=dequantize))


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    ("tensor", "damage", "message"),
    [
        ("up_proj.weight", None, r"has 3 tensors \S*up_proj.weight and 4 tensors \S*gate_proj.weight"),
        (
            "gate_proj.weight_scale",
            None,
            r"has 3 tensors \S*gate_proj.weight_scale and 4 tensors \S*(up|gate)_proj.weight",
        ),
        ("up_proj.weight", 250, r"(expert 1: up_proj|experts.1.up_proj.weight): A packed weight holds the code 250"),
    ],
)
def test_damaged_half_of_an_expert(make_moe, tmp_path, tensor, damage, message, dequantize):
    load(make_moe("qwen3_moe", num_hidden_layers=1), PTQTPConfig()).save_pretrained(tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "model.safetensors")
    name = f"model.layers.0.mlp.experts.1.{tensor}"
    if damage is None:
        del tensors[name]
    else:
        tensors[name][3, 4] = damage
    write(tmp_path / "good", tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match=rf"mlp.experts.gate_up_proj(_scale)?: .*{message}"):
        load(tmp_path / "bad", PTQTPConfig(dequantize=dequantize))


def test_one_half_of_a_fused_weight_cannot_be_chosen(make_moe):
    for options in (dict(planes_per_layer={"up_proj": 3}), dict(modules_to_not_convert=["up_proj"])):
        with pytest.raises(ValueError, match="'up_proj' matches no module of .*; did you mean 'gate_up_proj'"):
            load(make_moe("qwen3_moe"), PTQTPConfig(**options))


def test_bad_weights_of_an_expert(make_moe, tmp_path):
    source = make_moe("qwen3_moe", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"][0, 0] = float("inf")
    write(source, tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match="mlp.experts.gate_up_proj: expert 3: up_proj: .*NaN or an infinite value"):
        load(tmp_path / "bad", PTQTPConfig())


def write(source, destination, tensors):
    destination.mkdir()
    shutil.copy(source / "config.json", destination)
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
