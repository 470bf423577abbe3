"""Layers that are linear and no `nn.Linear`."""

import pytest
import torch
import torch.nn.functional as F
from helpers.checkpoints import assert_same, tensors
from helpers.round_trips import INPUT, load, logits, train
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from hf_rb import D2QuantConfig, PTQTPConfig
from hf_rb.quantizers import dequantize_checkpoint, export_gptq, quantize, quantize_checkpoint
from hf_rb.quantizers.packed.layer_kinds import features, is_linear_map, is_transposed
from hf_rb.quantizers.packed.linear import PackedLinear


CONFIGS = {
    "ptqtp": lambda **options: PTQTPConfig(group_size=32, **options),
    "rtn": lambda **options: D2QuantConfig(backend="rtn", group_size=32, bits=3, **options),
}


class Same(nn.Linear):
    def forward(self, input):
        return (input @ self.weight.T) + (0 if self.bias is None else self.bias)


class Scaled(nn.Linear):
    scale = 1.25

    def forward(self, input):
        return super().forward(input) * self.scale


class Clamped(nn.Linear):
    def forward(self, input):
        return super().forward(input).clamp(-100, 100)


class Noisy(nn.Linear):
    def forward(self, input):
        return F.dropout(super().forward(input), 0.5, self.training)


class WithMore(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(sizes[1]))


class TurnedRound(Conv1D):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 5), True),
        (Same(3, 5), True),
        (Same(4, 4, bias=False), True),
        (Conv1D(5, 3), True),
        (Conv1D(4, 4), True),
        (Scaled(3, 5), False),
        (Clamped(3, 5), False),
        (Noisy(3, 5), False),
        (WithMore(3, 5), False),
        (TurnedRound(4, 4), False),
        (nn.MultiheadAttention(8, 2).out_proj, False),  # whose weight is handed to a function
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), False),
        (nn.Conv1d(3, 5, 1), False),
    ],
)
def test_what_computes_a_linear_map(module, expected):
    before = torch.random.get_rng_state()
    assert is_linear_map(module) is expected and is_linear_map(module.to("meta")) is expected
    assert torch.equal(torch.random.get_rng_state(), before)


def test_features_of_linear_and_conv1d_agree():
    assert features(nn.Linear(3, 5)) == features(Conv1D(5, 3)) == (3, 5)
    assert is_transposed(Conv1D(5, 3)) and not is_transposed(nn.Linear(3, 5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, initializer_range=0.2)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, **sizes))
    falcon = FalconForCausalLM(FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes))
    folders = {}
    for name, model in (("gpt2", gpt2), ("falcon", falcon)):
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=0.5, std=0.2)  # biases that count
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "Conv1D"), ("falcon", "FalconLinear")])
def test_round_trips(folders, tmp_path, name, kind, method):
    source, config = folders[name], CONFIGS[method]
    model = load(source, config())
    assert len(model.hf_quantizer.report.layers) == 8 and model.hf_quantizer.report.skipped == ["lm_head"]
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), expected)
    quantize_checkpoint(source, tmp_path / "streamed", config(), progress=False)
    assert_same(tmp_path / "packed", tmp_path / "streamed")

    plain = load(tmp_path / "packed", config(dequantize=True))
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
    assert sum(type(module).__name__ == kind for module in plain.modules()) == 8
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "by-tensor", progress=False)
    assert_same(tmp_path / "by-tensor", tmp_path / "plain")
    assert torch.equal(logits(again.dequantize()), logits(plain))
    again.save_pretrained(tmp_path / "in-place")
    assert_same(tmp_path / "in-place", tmp_path / "plain")

    # The right way round: as near to the original as nine and eight levels of a group come.
    original, found = tensors(source), tensors(tmp_path / "plain")
    for key in original:
        assert (found[key] - original[key]).norm() <= 0.25 * original[key].norm(), key
    assert any(not torch.equal(found[key], original[key]) for key in original)


def test_gpt2_by_the_function(folders, tmp_path):
    report = quantize(folders["gpt2"], tmp_path / "out", CONFIGS["ptqtp"]())
    assert len(report.layers) == 8 and torch.isfinite(logits(load(tmp_path / "out"))).all()


@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_conv1d(folders, tmp_path, dora):
    """The adapter of the packed model is one for GPT-2 itself; merged after dequantizing it is the right way round."""
    torch.manual_seed(0)
    base = load(folders["gpt2"], CONFIGS["ptqtp"]())
    base.save_pretrained(tmp_path / "packed")
    config = LoraConfig(target_modules="all-linear", r=4, use_dora=dora, init_lora_weights=False)
    model = get_peft_model(base, config)
    losses = train(model, 3)
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(tmp_path / "packed"), tmp_path / "adapter")), expected)
    plain = load(tmp_path / "packed", CONFIGS["ptqtp"](dequantize=True))
    on_plain = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(on_plain), expected, atol=1e-3, rtol=1e-3)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-3, rtol=1e-3)


def test_subclasses_of_an_older_checkpoint_stay(folders, tmp_path):
    """Older versions left subclasses of `nn.Linear` as they are: what such a file holds is read as it is."""
    model = load(folders["gpt2"], CONFIGS["ptqtp"](modules_to_not_convert=["c_fc"]))
    model.config.quantization_config.modules_to_not_convert = None  # as if nobody had asked for it
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.transformer.h[0].mlp.c_fc) is Conv1D and torch.equal(logits(again), logits(model))
    assert isinstance(again.transformer.h[0].mlp.c_proj, PackedLinear)


def test_calibration_names_the_class(folders):
    with pytest.raises(ValueError, match=r"c_attn of GPT2LMHeadModel is a Conv1D, .* Use `backend='rtn'`"):
        load(folders["gpt2"], D2QuantConfig(dataset=["text"], rotate=False))


def test_no_gptq_of_conv1d(folders, tmp_path):
    load(folders["gpt2"], CONFIGS["ptqtp"](scale_mode="tied")).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="belongs to a Conv1D.* `hf-rb dequantize`"):
        export_gptq(tmp_path / "packed", tmp_path / "out", progress=False)


def test_nothing_to_pack_names_what_there_is(tmp_path):
    sizes = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"nothing to quantize in ResNetForImageClassification: .*\d+ Conv2d, 1 Linear\. PTQTP"
    ):
        ResNetForImageClassification.from_pretrained(tmp_path, quantization_config=PTQTPConfig())


def test_generation(folders):
    model = load(folders["gpt2"], CONFIGS["ptqtp"]())
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(INPUT, **options), model.generate(INPUT, use_cache=False, **options))
    assert isinstance(AutoModelForCausalLM.from_pretrained(folders["gpt2"]).transformer.h[0].attn.c_attn, Conv1D)
