"""Rounding the weights of a whole model, beside which quantized ones are measured."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_rb import PTQTPConfig
from hf_rb.quantizers.packed.baseline import packed_weights, round_to_nearest, round_weights


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_the_layers_of_a_report_are_rounded_and_nothing_else(make_model, make_moe, architecture):
    """`gpt_oss` keeps its experts transposed. The error is what the report says of 4-bit rounding."""
    folder = make_model() if architecture == "qwen3" else make_moe(architecture)
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PTQTPConfig(), dtype=torch.float32)
    report = packed.hf_quantizer.report
    names = [layer.name for layer in report.layers]
    assert sorted(packed_weights(packed)) == sorted(names)
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    assert round_weights(after, names)
    changed, errors = dict(after.named_parameters()), {}
    for name, weight in before.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in names:
            errors[layer] = ((changed[name] - weight).norm() / weight.norm()).item()
        else:
            assert torch.equal(changed[name], weight)
    for (
        layer
    ) in report.layers:  # all rows are in the report's sample; an expert's error weighs alike there, by its norm here
        assert errors[layer.name] == pytest.approx(layer.baseline_error, rel=1e-2 if "experts" in layer.name else 1e-4)


def test_a_conv1d_is_rounded_along_its_inputs():
    model = nn.Sequential()
    model.add_module("c_fc", Conv1D(24, 160))  # 24 outputs
    weight = model.c_fc.weight.detach().clone()
    assert round_weights(model, ["c_fc"])
    assert torch.equal(model.c_fc.weight, round_to_nearest(weight.T).T)


def test_another_structure_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model[0].weight.detach().clone()
    assert not round_weights(model, ["0", "layers.0"]) and torch.equal(model[0].weight, weight)
