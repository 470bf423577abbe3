"""Mixtures of experts through D²Quant's data-free mode."""

import pytest
import torch
from helpers.round_trips import load, logits, same_files, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_rb import D2QuantConfig
from hf_rb.quantizers.d2quant import D2QuantExperts, D2QuantLinear
from hf_rb.quantizers.d2quant.format import code_bits, is_dual
from hf_rb.quantizers.d2quant.maths import dsq, grids


ARCHITECTURES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"]


def rtn(**options):
    return D2QuantConfig(backend="rtn", dac=False, rotate=False, **options)


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, D2QuantExperts)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [2, 3])
def test_round_trip(make_moe, tmp_path, architecture, bits):
    source = make_moe(architecture)
    quantized = load(source, rtn(bits=bits), dtype=torch.float32)
    found = experts_of(quantized)
    assert len(found) == (1 if architecture == "deepseek_v3" else 2)
    assert not any("experts" in name for name in quantized.hf_quantizer.report.skipped)
    expected = logits(quantized)
    quantized.save_pretrained(tmp_path / "one")
    loaded = load(tmp_path / "one", dtype="auto")
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")

    # The names are those of the model's own checkpoint. Clamped experts keep their column scales.
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "one"))
    packed = {name for name, tensor in after.items() if name in before and tensor.dtype == torch.uint8}
    assert before.keys() <= after.keys()
    beside = after.keys() - before.keys()
    assert all(name.rpartition("_")[0] in packed for name in beside)
    kept = {name for name in beside if name.endswith("_column")}
    assert (len(kept) == 2) is (architecture == "gpt_oss") and (not kept or architecture == "gpt_oss")

    plain = load(tmp_path / "one", rtn(dequantize=True))
    assert not any(isinstance(module, (D2QuantLinear, D2QuantExperts)) for module in plain.modules())
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == before.keys()
    assert torch.equal(logits(loaded.dequantize()), logits(plain))


def test_an_expert_is_rounded_on_its_own(make_moe):
    source = make_moe("qwen3_moe")
    weights = load_file(source / "model.safetensors")
    experts = load(source, rtn()).model.layers[1].mlp.experts
    prefix = "model.layers.1.mlp.experts.2"
    down = dsq.round_to_nearest(weights[f"{prefix}.down_proj.weight"], 2)
    gate, up = (
        grids.round_to_nearest(weights[f"{prefix}.{name}.weight"], 2).dequantize() for name in ("gate_proj", "up_proj")
    )
    assert torch.equal(experts.unpacked("down_proj")[2], down.planes())
    found = experts.unpacked("gate_up_proj")[2].chunk(2)
    assert torch.equal(found[0], gate)
    expected = up * down.column_scale[:, None]
    assert (found[1] - expected).norm() < 5e-4 * expected.norm()


@pytest.mark.parametrize(
    ("architecture", "options", "stored"),
    [
        ("qwen3_moe", dict(bits_per_layer={"down_proj": 4}), dict(gate_up_proj=(2, False), down_proj=(4, False))),
        ("gpt_oss", dict(bits_per_layer={"mlp.experts": 3}), dict(gate_up_proj=(3, False), down_proj=(3, True))),
        ("mixtral", dict(dsq=False, group_size=64), dict(gate_up_proj=(2, False), down_proj=(2, False))),
        ("qwen3_moe", dict(modules_to_not_convert=["experts.gate_up_proj"]), dict(down_proj=(2, True))),
        ("qwen3_moe", dict(modules_to_not_convert=["experts"]), None),
    ],
)
def test_options_decide_which_experts_are_packed(make_moe, tmp_path, architecture, options, stored):
    model = load(make_moe(architecture, num_hidden_layers=1), rtn(**options), dtype=torch.float32)
    found = [
        {name: (code_bits(layout), is_dual(layout)) for name, layout in experts.layouts.items()}
        for experts in experts_of(model)
    ]
    assert found == ([stored] if stored else [])
    kept = model.config.quantization_config.column_modules or []
    assert bool(kept) is (architecture == "gpt_oss" or stored == dict(down_proj=(2, True)))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    torch.testing.assert_close(logits(model.dequantize()), logits(load(tmp_path)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_adapters(make_moe, architecture):
    model = load(make_moe(architecture), rtn(), dtype=torch.float32)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", target_parameters=targets, r=4))
    losses = train(adapted, 6)
    assert losses[-1] < losses[0]
    expected = logits(adapted)
    adapted.dequantize()
    torch.testing.assert_close(logits(adapted), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("down_proj.weight", r"has 3 tensors \S*down_proj.weight and 4 tensors \S*down_proj.weight_"),
        ("up_proj.weight_zero", r"has 3 tensors \S*up_proj.weight_zero and 4 tensors"),
        ("gate_proj.weight_hi", r"has 3 tensors \S*gate_proj.weight_hi and 4 tensors"),
    ],
)
def test_missing_tensors(make_moe, tmp_path, tensor, message, dequantize):
    load(make_moe("qwen3_moe", num_hidden_layers=1), rtn(bits=3)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored[f"model.layers.0.mlp.experts.1.{tensor}"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"mlp.experts.(gate_up|down)_proj: .*{message}"):
        load(tmp_path, rtn(dequantize=True) if dequantize else None)


def test_calibration_refuses_experts(make_moe):
    with pytest.raises(ValueError, match=r"fused experts.*`backend='rtn'`"):
        load(make_moe("qwen3_moe"), D2QuantConfig(dataset=["text"]))
