"""Mixtures of experts through D²Quant's data-free mode."""

import pytest
import torch
from helpers.round_trips import load
from safetensors.torch import load_file, save_file

from hf_rb import D2QuantConfig
from hf_rb.quantizers.d2quant.maths import dsq, grids


def rtn(**options):
    return D2QuantConfig(backend="rtn", dac=False, rotate=False, **options)


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
