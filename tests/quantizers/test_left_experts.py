"""The experts of one layer left as they are: loaded, from the command line, and streamed."""

import pytest
import torch
from helpers.checkpoints import assert_same
from helpers.mixtures import MOE
from helpers.round_trips import load, logits
from safetensors.torch import load_file

from hf_rb import D2QuantConfig, PTQTPConfig
from hf_rb.cli import main
from hf_rb.quantizers.packed.linear import PackedModule


ARCHITECTURES = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"]
METHODS = {
    "ptqtp": (PTQTPConfig, []),
    "d2quant": (
        lambda **options: D2QuantConfig(backend="rtn", **options),
        ["--method", "d2quant", "--backend", "rtn"],
    ),
}
SHARED = dict(shared_expert_intermediate_size=96, intermediate_size=96)
LEFT = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_layer_left(make_moe, tmp_path, architecture, method):
    options = {"deepseek_v3": dict(first_k_dense_replace=0), "qwen2_moe": MOE["qwen3_moe"] | SHARED}.get(
        architecture, {}
    )
    source, (config, arguments) = make_moe(architecture, **options), METHODS[method]
    model = load(source, config(modules_to_not_convert=[LEFT]))
    assert isinstance(model.get_submodule(LEFT.replace("1", "0")), PackedModule)
    left, original = model.get_submodule(LEFT), load(source).get_submodule(LEFT)
    assert not isinstance(left, PackedModule)
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in left.state_dict().items())
    expected = logits(model)

    model.save_pretrained(tmp_path / "loaded")
    for name, more in (("memory", []), ("stream", ["--stream"])):
        main(["quantize", str(source), str(tmp_path / name), "--skip", LEFT, *arguments, *more])
        assert_same(tmp_path / name, tmp_path / "loaded")
        assert torch.equal(logits(load(tmp_path / name)), expected)
    plain = load(tmp_path / "stream", config(dequantize=True))
    assert torch.equal(plain.get_submodule(LEFT).gate_up_proj, original.gate_up_proj)
    load(tmp_path / "stream").save_pretrained(tmp_path / "again")
    assert_same(tmp_path / "again", tmp_path / "stream")


@pytest.mark.parametrize("method", METHODS)
def test_files_that_are_turned(tmp_path, method):
    # Older files of Qwen3-VL-MoE have the experts' weights the other way round; the layer that is left is turned as ever.
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

    text = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    text |= dict(head_dim=16, vocab_size=96, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2)
    text |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 4]))
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, deepstack_visual_indexes=[0]
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    stored = load_file(file)
    experts = [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(experts) == 4
    turned = {name: stored[name].mT.contiguous() for name in experts}
    save_file(stored | turned, file, {"format": "pt"})
    left = next(name for name, _ in model.named_modules() if name.endswith("layers.1.mlp.experts"))
    config = METHODS[method][0](modules_to_not_convert=[left])
    both = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, quantization_config=config).state_dict()
        for name in ("old", "new")
    ]
    assert both[0].keys() == both[1].keys() and all(torch.equal(both[0][name], both[1][name]) for name in both[0])
