"""NSDS as a setting of the two quantizers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from hf_rb import D2QuantConfig, PTQTPConfig
from hf_rb.quantizers import quantize, quantize_checkpoint
from hf_rb.quantizers.allocation import nsds
from hf_rb.quantizers.allocation.allocate import allocate_layers


LAYERS = ["model.layers.0", "model.layers.1"]
CONFIGS = [
    (lambda: PTQTPConfig(planes_per_layer="nsds:2.5"), "planes_per_layer", 2, 3),
    (lambda: D2QuantConfig(backend="rtn", bits_per_layer="nsds:3.0"), "bits_per_layer", 2, 4),
]


def load(folder, config=None):
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": config} if config else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@pytest.mark.parametrize(("config", "field", "low", "high"), CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_layers_get_what_their_scores_say(make_model, tmp_path, config, field, low, high, tied):
    folder = make_model("qwen3", tied=tied, seed=1)
    model = load(folder, config())
    found = model.hf_quantizer.report.allocation
    assert [layer.name for layer in found] == LAYERS
    assert sorted(layer.given for layer in found) == [low, high]
    assert max(found, key=lambda layer: layer.score).given == high
    given = {layer.name: layer.given for layer in found}
    assert getattr(model.config.quantization_config, field) == given
    plain = load(folder, type(config())(**{**explicit(config()), field: given}))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name

    model.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stored[field] == given
    loaded = load(tmp_path / "saved")
    inputs = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, model(inputs).logits)


def explicit(config):
    return {"backend": "rtn"} if isinstance(config, D2QuantConfig) else {}


def test_heads_are_as_wide_as_the_configuration_says(tmp_path, monkeypatch):
    """64 channels in 4 heads are not heads of 16, as the released code has it."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=32)).save_pretrained(tmp_path)
    seen, layer_numbers = [], nsds.layer_numbers

    def recorded(weights, head_dim, directions):
        seen.append((head_dim, len(weights.query) // head_dim))
        return layer_numbers(weights, head_dim, directions)

    monkeypatch.setattr(nsds, "layer_numbers", recorded)
    report = load(tmp_path, PTQTPConfig(planes_per_layer="nsds:2.5")).hf_quantizer.report
    assert seen == [(32, 4)] * 2 and [layer.name for layer in report.allocation] == LAYERS  # counted from 0


def test_the_same_tensor_by_tensor(make_model, tmp_path):
    folder = make_model("llama", tied=True)
    whole = quantize(folder, tmp_path / "whole", PTQTPConfig(planes_per_layer="nsds:2.5"))
    streamed = quantize_checkpoint(folder, tmp_path / "streamed", PTQTPConfig(planes_per_layer="nsds:2.5"))
    assert whole.allocation == streamed.allocation
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "streamed"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "streamed"))
    assert first == second


def test_command_line(make_model, tmp_path, capsys):
    from hf_rb.cli import main

    arguments = ["quantize", str(make_model("llama")), str(tmp_path / "out"), "--planes-per-layer"]
    assert main([*arguments, "nsds:2.5"]) == 0
    printed = capsys.readouterr().out
    assert "decoder layer (NSDS)" in printed and "model.layers.1" in printed
    assert main([*arguments, "nsds:2.5", "down_proj=3"]) == 2
    assert "'nsds:2.5' says what every layer gets" in capsys.readouterr().err


def test_refuses_what_is_no_strategy():
    for bad in ("nsds", "nsds:4.5", "nsds:1.9", "zd:3.0"):
        with pytest.raises(ValueError, match="`bits_per_layer` as text must be 'nsds:' and an average from 2 to 4"):
            D2QuantConfig(backend="rtn", bits_per_layer=bad)
    with pytest.raises(ValueError, match="from 2 to 3, such as 'nsds:2.5'; got 'nsds:3.5'"):
        PTQTPConfig(planes_per_layer="nsds:3.5")
    with pytest.raises(ValueError, match="ties two scales"):
        PTQTPConfig(planes_per_layer="nsds:2.5", scale_mode="tied")
    with pytest.raises(ValueError, match="`bits_per_layer` as text must be 'nsds:' and an average.*; got 'zd:3.0'"):
        allocate_layers(D2QuantConfig.record, "zd:3.0", torch.nn.Identity(), None)


def test_refuses_models_that_it_cannot_score(make_moe, make_model, tmp_path):
    with pytest.raises(ValueError, match="model.layers.0 of Qwen3MoeForCausalLM has no mlp.up_proj. Name the layers"):
        load(make_moe("qwen3_moe"), PTQTPConfig(planes_per_layer="nsds:2.5"))
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

    with pytest.raises(
        ValueError, match="GPT2LMHeadModel has no list of decoder layers called `layers`. Name layers yourself"
    ):
        GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96)).save_pretrained(tmp_path)
        load(tmp_path, PTQTPConfig(planes_per_layer="nsds:2.5"))
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        options = {"quantization_config": PTQTPConfig(planes_per_layer="nsds:2.5")}
        LlamaModel.from_pretrained(make_model("llama"), **options)
    folder = make_model("llama")
    state = {name: tensor.clone() for name, tensor in load(folder).state_dict().items()}
    with pytest.raises(ValueError, match="from safetensors files"):
        LlamaForCausalLM.from_pretrained(
            None,
            config=LlamaConfig.from_pretrained(folder),
            state_dict=state,
            quantization_config=PTQTPConfig(planes_per_layer="nsds:2.5"),
        )
