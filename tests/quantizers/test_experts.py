"""Fused experts: five architectures through `from_pretrained` and `save_pretrained`."""

import filecmp

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_rb import PTQTPConfig
from hf_rb.quantizers.ptqtp import PTQTPLinear
from hf_rb.quantizers.ptqtp.experts import PTQTPExperts, projections


INPUT = torch.arange(24).view(2, 12)

ARCHITECTURES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"]


def load(folder, config=None, **kwargs):
    if config is not None:
        kwargs["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model):
    return model(INPUT).logits


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, PTQTPExperts)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(make_moe, tmp_path, architecture):
    source = make_moe(architecture)
    quantized = load(source, PTQTPConfig(), dtype=torch.float32)
    layers = experts_of(quantized)
    assert len(layers) == (1 if architecture == "deepseek_v3" else 2)
    assert {tuple(layer.layouts) for layer in layers} == {("gate_up_proj", "down_proj")}
    assert not any("experts" in name for name in quantized.hf_quantizer.report.skipped)
    for name, module in load(source).named_modules():
        if projections(module):
            packed = quantized.get_submodule(name)
            for parameter in ("gate_up_proj", "down_proj"):
                weight = getattr(module, parameter).float()
                weight = weight.mT if module.is_transposed else weight
                assert 0.13 < (packed.unpacked(parameter) - weight).norm() / weight.norm() < 0.18
    expected = logits(quantized)

    quantized.save_pretrained(tmp_path / "one")
    loaded = load(tmp_path / "one", dtype="auto")
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")

    # The names are those of the model's own checkpoint.
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "one"))
    packed = [name for name, tensor in after.items() if tensor.dtype == torch.uint8]
    assert after.keys() == before.keys() | {f"{name}_scale" for name in packed}
    assert all(after[name].shape != before[name].shape for name in packed)
    assert all(after[f"{name}_scale"].dtype == torch.float16 for name in packed)

    plain = load(tmp_path / "one", PTQTPConfig(dequantize=True))
    assert not experts_of(plain) and not any(isinstance(module, PTQTPLinear) for module in plain.modules())
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == before.keys()
    assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))

    assert torch.equal(logits(loaded.dequantize()), logits(plain))
    loaded.save_pretrained(tmp_path / "dequantized")
    assert same_files(tmp_path / "plain", tmp_path / "dequantized")
