import copy

import pytest
import torch

from hf_rb.quantizers.d2quant.maths.rotation import check, fuse_and_rotate, fuse_norms, hadamard, resolve_block, untie


SIZES = dict(hidden_size=96, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(head_dim=32, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def build(kind, dtype=torch.float64, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | options)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers computes norms in float32, whatever the type of the model."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for kind in (LlamaRMSNorm, Phi3RMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", forward)


@torch.no_grad()
def logits(model):
    return model(torch.arange(24).view(2, 12)).logits


KINDS = [("llama", dict(attention_bias=True, mlp_bias=True)), ("qwen2", {}), ("qwen3", {}), ("phi3", {})]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_stay(exact_norms, kind, options, tied):
    model = build(kind, tie_word_embeddings=tied, **options)
    before = logits(model)
    fused = copy.deepcopy(model)
    untie(fused)
    fuse_norms(fused)
    torch.testing.assert_close(logits(fused), before, rtol=1e-10, atol=1e-10)
    old = copy.deepcopy(model.state_dict())
    assert fuse_and_rotate(model) == 32
    torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-10)
    for name, weight in model.state_dict().items():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            assert (weight == 1).all()
        elif not name.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias")) and (
            not name.endswith(("gate_proj.bias", "up_proj.bias"))
        ):
            assert not torch.equal(weight, old[name]), name


def test_rotation_in_float32_keeps_the_logits(exact_norms):
    model = build("llama", torch.float32, tie_word_embeddings=True)
    before = logits(model)
    fuse_and_rotate(model)
    assert (logits(model) - before).norm() < 1e-4 * before.norm()


def test_outliers_are_spread():
    model = build("llama", torch.float32)
    model.model.layers[0].mlp.up_proj.weight.data[:, 5] *= 50
    before = model.model.layers[0].mlp.up_proj.weight.abs().amax()
    fuse_and_rotate(model)
    assert model.model.layers[0].mlp.up_proj.weight.abs().amax() < 0.5 * before


def test_rotated_model_is_saved_as_it_is(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build("llama", torch.float32, tie_word_embeddings=True)
    fuse_and_rotate(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(logits(loaded), logits(model))


def test_untie_leaves_what_is_not_tied():
    model = build("llama", tie_word_embeddings=False)
    weight = model.lm_head.weight
    untie(model)
    assert model.lm_head.weight is weight
    untie(model.model)  # without a head
    assert model.model.config.tie_word_embeddings is False


def test_hadamard():
    for width in (1, 2, 64, 128):
        matrix = hadamard(width, seed=3)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(matrix.abs(), torch.full((width, width), width**-0.5).double())
    assert torch.equal(hadamard(64, 1), hadamard(64, 1)) and not torch.equal(hadamard(64, 1), hadamard(64, 2))


def test_block_width():
    assert [resolve_block(hidden) for hidden in (576, 4096, 96, 100)] == [64, 128, 32, 4]
    assert resolve_block(4096, 256) == 256 and resolve_block(576, 1) == 1
    for block in (128, 96, 0):
        with pytest.raises(ValueError, match="power of two that divides the hidden size 576, so at most 64"):
            resolve_block(576, block)


REFUSED = [
    ("gemma", {}, "GemmaRMSNorm is no RMSNorm that multiplies by its weight"),
    ("gemma2", {}, "it has model.layers.0.pre_feedforward_layernorm.weight"),
    ("olmo2", {}, "input_layernorm"),
    ("cohere", {}, "post_attention_layernorm"),
    ("opt", dict(ffn_dim=80, word_embed_proj_dim=96), "is none: OPTDecoderLayer has no input_layernorm."),
    ("stablelm", {}, "LayerNorm is no RMSNorm"),
    ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32), "experts"),
]


@pytest.mark.parametrize(("kind", "options", "reason"), REFUSED)
def test_refuses_what_it_does_not_know(kind, options, reason):
    model = build(kind, torch.float32, **options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"in the manner of Llama(?s:.*){reason}(?s:.*)`rotate=False`"):
        fuse_and_rotate(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.device("meta"):  # the same answer before there are weights
        skeleton = type(model)(model.config)
    with pytest.raises(ValueError, match=f"in the manner of Llama(?s:.*){reason}"):
        check(skeleton)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_skeleton_tells_what_can_be_rotated(kind, options):
    model = build(kind, torch.float32, **options).to("meta")
    check(model)
    with pytest.raises(ValueError, match="power of two that divides"):
        check(model, 3)
