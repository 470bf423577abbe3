from functools import cache

import pytest
import torch
from helpers.mixtures import MOE, MOE_SIZES


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Saves a random Qwen3 or Llama whose hidden size is one and a half groups, and returns its folder, the same for
    the same arguments: nobody writes into it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    @cache
    def make(architecture="qwen3", tied=True, bias=False, dtype=torch.bfloat16, seed=0):
        sizes = dict(hidden_size=192, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(num_key_value_heads=2, head_dim=48, vocab_size=96, tie_word_embeddings=tied, attention_bias=bias)
        kinds = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
        config_class, model_class = kinds[architecture]
        torch.manual_seed(seed)
        model = model_class(config_class(initializer_range=0.05, **sizes)).to(dtype)
        if bias:
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter)
        folder = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_moe(tmp_path_factory):
    """Saves a random mixture of experts in bfloat16 and returns its folder, the same for the same arguments."""
    from transformers import AutoConfig, AutoModelForCausalLM

    @cache
    def make(architecture, **options):
        sizes = MOE_SIZES | MOE.get(architecture, {}) | dict(vocab_size=64) | options
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.05)
        folder = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(folder)
        return folder

    return make
