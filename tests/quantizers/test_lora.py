"""Adapters on packed layers."""

import pytest
import torch
from helpers.round_trips import INPUT, logits, train
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rb import PTQTPConfig
from hf_rb.quantizers.loading.adapters import ParamWrapper
from hf_rb.utils import compat


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=PTQTPConfig(**options), dtype=torch.float32
    )


@pytest.fixture(scope="module")
def folder(make_model):
    return make_model(bias=True)


@pytest.fixture
def base(folder):
    return load(folder)


def adapted(base, **options):
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**dict(target_modules="all-linear", r=4) | options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def packed(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}


def test_adapters_save_and_load_by_transformers(base, folder, tmp_path):
    if problem := compat.native_adapters_problem():
        pytest.skip(problem)
    model = adapted(base)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    native = load(folder)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native), expected)
    native.save_pretrained(tmp_path / "native")
    assert not (tmp_path / "native" / "model.safetensors").exists()  # only the adapter


def test_merged_model_is_an_ordinary_one(base, tmp_path):
    model = adapted(base)
    model.dequantize()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged)) and not packed(again)


def test_no_other_adapter_is_merged_either(base):
    model = get_peft_model(base, IA3Config(target_modules=["up_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="dequantize first"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(init_lora_weights="pissa"), "'pissa'` starts from the plain weights"),
        (dict(init_lora_weights="orthogonal"), "'orthogonal'` starts from the plain weights"),
    ],
)
def test_adapters_that_need_the_plain_weights(base, options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LoraConfig(target_modules="all-linear", **options))


def test_gradient_checkpointing(base):
    model = adapted(base)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(INPUT, labels=INPUT).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_the_plain_model(base, dora):
    model = adapted(base, use_dora=dora)
    values = logits(model)
    model(INPUT, labels=INPUT).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.dequantize()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected.keys()
    torch.testing.assert_close(logits(model), values, atol=1e-4, rtol=1e-4)
    model(INPUT, labels=INPUT).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3)
    assert len(expected) == 14 * (3 if dora else 2)


def test_dora_saves_loads_and_is_not_merged(base, folder, tmp_path):
    model = adapted(base, use_dora=True)
    losses = train(model, 4)
    assert losses[-1] < losses[0] - 0.1
    expected = logits(model)
    with pytest.raises(ValueError, match="dequantize first"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder), tmp_path)
    assert torch.equal(logits(again), expected)
    again.dequantize()
    torch.testing.assert_close(logits(again.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_a_model_prepared_for_kbit_training(base, tmp_path):
    expected = logits(base)
    base.save_pretrained(tmp_path / "one")
    prepare_model_for_kbit_training(base)
    assert base.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32  # PEFT does not know better
    base.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
    prepare_model_for_kbit_training(base)
    assert torch.equal(logits(base), expected)
    train(adapted(base), 1)


# Mixtures of experts.


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts(make_moe, tmp_path, architecture):
    folder = make_moe(architecture)
    targets = dict(target_modules="all-linear")  # PEFT counts the experts among them, but not those of GPT-OSS
    if architecture == "gpt_oss":
        targets["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(load(folder), **targets)
    names = {name for name, module in model.named_modules() if isinstance(module, ParamWrapper)}
    assert len(names) == 4
    before = packed(model)
    losses = train(model, 6)
    assert losses[-1] < losses[0] and len(before) == 12
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed(model).items())

    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)

    model(INPUT, labels=INPUT).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-3)
    model(INPUT, labels=INPUT).loss.backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-2)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-3, rtol=1e-3)


def test_experts_that_were_left_out(make_moe):
    model = load(make_moe("qwen3_moe"), modules_to_not_convert=["gate_up_proj"])
    model = get_peft_model(model, LoraConfig(target_parameters=["experts.gate_up_proj"], r=2))
    losses = train(model, 4)
    assert losses[-1] < losses[0]


def test_no_dora_on_experts(make_moe):
    with pytest.raises(ValueError, match="DoRA needs the norms .* of experts are packed: write `use_dora=False`"):
        adapted(load(make_moe("qwen3_moe")), target_parameters=["experts.gate_up_proj"], use_dora=True)


def test_a_packed_layer_as_a_parameter(base):
    with pytest.raises(ValueError, match="name the layer in `target_modules`"):
        get_peft_model(base, LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]))
