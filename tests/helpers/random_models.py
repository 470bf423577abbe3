"""Small models with random weights, for tests."""

from pathlib import Path

from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_utils import set_seed

from hf_rb import tiny


__all__ = ["save_qwen3"]


def save_qwen3(folder, seed=0, padding=0, **config):
    """
    Saves a random Qwen3 with the embedded tokenizer, and `padding` ids more. With a `vocab_size` of its own it has no tokenizer.
    Returns the folder.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    if "vocab_size" not in config:
        config |= {
            "vocab_size": len(tokenizer) + padding,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        tokenizer.save_pretrained(folder)
    set_seed(seed)
    config = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        **config,
    }
    Qwen3ForCausalLM(Qwen3Config(**config)).save_pretrained(folder)
    return Path(folder)
