import pytest
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_utils import set_seed

from hf_rb import tiny


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """Folder of a random Qwen3 with the embedded tokenizer; labels get probabilities on both sides of 0.001."""
    folder = tmp_path_factory.mktemp("models") / "random-student"
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    set_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path):
    """Keyword arguments of a short run on the CPU."""
    return {
        "output_dir": str(tmp_path / "output"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
