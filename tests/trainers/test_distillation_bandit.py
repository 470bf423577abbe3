"""G-OPD converges to softmax(λ z_T + (1 - λ) z_R) in a world of one state: a prompt of one token, answers of one token."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_utils import set_seed

from hf_rb import DistillationConfig, DistillationTrainer


ARMS = 3
TEACHER, START = [0.2, 0.7, 0.1], [0.6, 0.2, 0.2]
TOKENS = ["x", "y", "z", "prompt", "<eos>", "<pad>"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>", padding_side="left"
    )


@pytest.fixture(scope="module")
def backbone(tokenizer):
    set_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(TOKENS),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def state_of(model):
    return model.model(torch.tensor([[TOKENS.index("prompt")]])).last_hidden_state[0, 0]


@torch.no_grad()
def policy(backbone, probs):
    """A model that draws the arms with given probabilities, of which only the logits in the one state can be trained."""
    model = copy.deepcopy(backbone).requires_grad_(False)
    logits = torch.full((len(TOKENS),), -30.0)
    logits[:ARMS] = torch.tensor(probs).log()
    state = state_of(model)
    model.lm_head.weight.copy_(torch.outer(logits, state) / state.square().sum())
    model.lm_head.requires_grad_(True)
    return model


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25])
def test_fixed_point(backbone, tokenizer, tmp_path, scale):
    student = policy(backbone, START)
    args = DistillationConfig(
        str(tmp_path),
        objective="gopd",
        reward_scale=scale,
        max_completion_length=1,
        per_device_train_batch_size=512,
        max_steps=80,
        optim="sgd",
        # Per unit of the logits' gradient, since those are the head times the state.
        learning_rate=4.0 / state_of(student).square().sum().item(),
        lr_scheduler_type="linear",
        max_grad_norm=1e3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        student,
        policy(backbone, TEACHER),
        args,
        Dataset.from_dict({"prompt": ["prompt"] * 512}),
        processing_class=tokenizer,
    )
    trainer.train()
    z_t, z_r = torch.tensor(TEACHER).log(), torch.tensor(START).log()
    found = (trainer.model.lm_head.weight @ state_of(trainer.model))[:ARMS].softmax(-1)
    torch.testing.assert_close(found, (scale * z_t + (1 - scale) * z_r).softmax(-1), atol=0.02, rtol=0)
