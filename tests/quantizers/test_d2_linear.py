"""The layer of D²Quant, and where its column scales go."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.mixtures import MOE, MOE_SIZES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_rb.quantizers.d2quant import D2QuantLinear
from hf_rb.quantizers.d2quant.maths import absorption, dsq, grids


SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
SIZES |= dict(vocab_size=96, pad_token_id=0, eos_token_id=1, bos_token_id=2)


def weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def matrices():
    for bits in (2, 3, 4):
        yield grids.round_to_nearest(weight(24, 200), bits, 64)
        if bits < 4:
            yield dsq.round_to_nearest(weight(24, 200), bits, 64)


@pytest.mark.parametrize("codes", matrices(), ids=lambda codes: f"{type(codes).__name__}{codes.bits}")
def test_layer_multiplies_with_its_weights(codes):
    bias = torch.randn(24)
    layer = D2QuantLinear.from_codes(codes, bias)
    assert isinstance(layer, nn.Linear) and layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
    torch.testing.assert_close(layer.dequantize(), codes.dequantize(), atol=1e-6, rtol=0)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 200, requires_grad=True)
        output = layer(x)
        torch.testing.assert_close(output, F.linear(x, codes.dequantize(), bias), atol=2e-5, rtol=1e-4)
        output.sum().backward()
        torch.testing.assert_close(x.grad, codes.dequantize().sum(0).expand_as(x), atol=2e-5, rtol=1e-4)
        rounded = layer(x.detach().bfloat16()).float()
        torch.testing.assert_close(rounded, output.detach(), atol=0.2, rtol=0.05)
    plain = layer.plain()
    torch.testing.assert_close(plain(x), output, atol=2e-5, rtol=1e-4)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(again(x), output)
    before = {name: tensor.dtype for name, tensor in layer.named_parameters() if "weight" in name}
    layer.to(torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in layer.named_parameters() if "weight" in name} == before
    assert layer.bias.dtype == torch.bfloat16
    assert f"bits={codes.bits}" in repr(layer)


# Absorption.


def model_of(architecture, **options):
    sizes = MOE_SIZES | MOE[architecture] | dict(vocab_size=64) if architecture in MOE else SIZES
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes | options)).eval()
    model.set_experts_implementation("eager")  # others take no float64
    return model


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("qwen3", {}, ("mlp.up_proj", slice(None))),
        ("llama", dict(mlp_bias=True), ("mlp.up_proj", slice(None))),
        ("phi3", {}, ("mlp.gate_up_proj", slice(96, 192))),
        ("gemma2", {}, ("mlp.up_proj", slice(None))),  # GELU, but on the gate
        ("opt", dict(ffn_dim=96, word_embed_proj_dim=64), ("fc1", slice(None))),
        ("qwen3_moe", dict(num_hidden_layers=1), ("mlp.experts.gate_up_proj", slice(80, 160))),
        ("mixtral", dict(num_hidden_layers=1), ("mlp.experts.gate_up_proj", slice(80, 160))),
    ],
)
def test_up_and_down_projections_are_paired(architecture, options, expected):
    model = model_of(architecture, **options)
    (pair,) = absorption.pairs(model)
    assert pair.up.endswith(expected[0]) and pair.rows == expected[1] and not absorption.refusals(model)
    assert absorption.down_projections(model) == [pair.down]
    # The identity, in the model itself.
    model.double()
    ids = torch.arange(12)[None]
    before = model(ids).logits
    tensors = dict(model.named_parameters())
    down, up = (tensors.get(name, tensors.get(f"{name}.weight")) for name in (pair.down, pair.up))
    factor = torch.rand(down.shape[-1], dtype=torch.float64) + 0.5
    with torch.no_grad():
        down *= factor
        assert (model(ids).logits - before).abs().max() > 1e-6
        down /= factor**2
        up[..., pair.rows, :] *= factor[:, None]
        if (bias := tensors.get(f"{pair.up}.bias")) is not None:
            bias[pair.rows] *= factor
    torch.testing.assert_close(model(ids).logits, before, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("architecture", "options", "activation"),
    [
        ("opt", dict(ffn_dim=96, word_embed_proj_dim=64, activation_function="gelu"), "GELUActivation"),
        ("phi", {}, "NewGELUActivation"),
        ("nemotron", {}, "ReLUSquaredActivation"),
        ("gpt_oss", dict(num_hidden_layers=1), None),  # both branches are clamped
    ],
)
def test_projections_with_another_activation_are_not_paired(architecture, options, activation):
    model = model_of(architecture, **options)
    assert not absorption.pairs(model)
    ((down, reason),) = absorption.refusals(model).items()
    assert "is not proportional to the output of" in reason and (activation is None or f"({activation})" in reason)
    assert absorption.down_projections(model) == [down]


def quantized_mlp(bits=2, up_bias=True, up=None):
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = D2QuantLinear.from_codes(grids.round_to_nearest(weight(96, 64, 1), bits, 32))
            bias = torch.randn(96) if up_bias else None
            self.up_proj = up or D2QuantLinear.from_codes(grids.round_to_nearest(weight(96, 64, 2), bits, 32), bias)
            self.down_proj = D2QuantLinear.from_codes(dsq.round_to_nearest(weight(64, 96, 3), bits, 32))

        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    model = nn.Module()
    model.mlp = MLP()
    return model


@pytest.mark.parametrize("bits", [2, 3])
def test_column_scales_are_absorbed_by_the_up_projection(bits):
    model = quantized_mlp(bits)
    x = torch.randn(5, 64)
    before, codes = model.mlp(x), model.mlp.up_proj.weight.clone()
    assert absorption.absorb(model) == []
    assert not hasattr(model.mlp.down_proj, "weight_column")
    assert torch.equal(model.mlp.up_proj.weight, codes)
    # Scales are rounded to float16 once more: half a unit in 2048, and levels are differences of two.
    assert (model.mlp(x) - before).norm() < 2e-3 * before.norm()
    assert absorption.absorb(model) == []  # there is nothing left to do


def test_what_cannot_be_absorbed_stays(caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    model = quantized_mlp(up=nn.Linear(64, 96))
    x = torch.randn(5, 64)
    before = model.mlp(x)
    assert absorption.absorb(model) == ["mlp.down_proj"]
    assert torch.equal(model.mlp(x), before)
    assert "mlp.up_proj has no scales to put them into" in caplog.text
    model = quantized_mlp()
    model.mlp.down_proj.weight_column.data *= 1e6
    assert absorption.absorb(model) == ["mlp.down_proj"]
    assert "out of the range of float16" in caplog.text
    logging.disable_propagation()
