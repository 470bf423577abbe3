"""Small checkpoints of every kind, and how their tensors are compared."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


SIZES = dict(hidden_size=192, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(head_dim=48, vocab_size=96, initializer_range=0.05)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=96)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def qwen3(folder):
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(folder, max_shard_size="100KB")


def untied_with_biases(folder):
    config = Qwen3Config(**SIZES, tie_word_embeddings=False, attention_bias=True)
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.half().save_pretrained(folder)


def without_head(folder):
    # The names of a model without a head lack a prefix, which the saved quantized model has.
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).bfloat16().model.save_pretrained(folder)
    edit_config(folder, architectures=["LlamaForCausalLM"])


def second_copy_of_tied_tensor(folder):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).bfloat16()
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.rotary_emb.inv_freq"] = torch.zeros(24)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def experts(folder):
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4)).bfloat16().save_pretrained(folder)


def fused_experts(folder):
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4)).bfloat16()
    model.save_pretrained(folder, save_original_format=False)


def transposed_experts(folder, **sizes):
    sizes = SIZES | {"layer_types": ["full_attention"]} | sizes
    config = GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder)


def square_transposed_experts(folder):
    transposed_experts(folder, intermediate_size=192)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
