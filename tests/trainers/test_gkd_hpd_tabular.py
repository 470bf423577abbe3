"""HPD in a world of one state, whose data only ever show one answer: the drawn tokens recover the teacher's whole distribution."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_rb import GKDConfig, GKDTrainer


ANSWERS = 4
TEACHER = torch.tensor([0.6, 0.2, 0.15, 0.05])
LENGTH, STEPS, RATE = 512, 300, 2.0
TOKENS = [*"abcd", "prompt", "<eos>", "<pad>"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")


@torch.no_grad()
def policy(probs):
    """A model with these probabilities of the answers everywhere, of which only the logits can be trained."""
    config = Qwen3Config(
        vocab_size=len(TOKENS),
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).requires_grad_(False)
    model.model.embed_tokens.weight.fill_(1.0)
    for name, parameter in model.model.layers.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    model.lm_head.weight.fill_(-30.0 / 4)  # the state is (1, 1, 1, 1)
    model.lm_head.weight[:ANSWERS] = probs.log().unsqueeze(1) / 4
    model.lm_head.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    "sample, expected", [(True, TEACHER), (False, torch.tensor([0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3]))]
)
def test_fixed_point(tokenizer, tmp_path, sample, expected):
    # Labels that are not the next tokens: the model does not see which token it reads.
    rows = [{"input_ids": [ANSWERS] * (LENGTH + 1), "labels": [-100] + [0] * LENGTH}]
    args = GKDConfig(
        str(tmp_path),
        objective="hpd",
        hpd_sample=sample,
        lmbda=0.0,
        per_device_train_batch_size=len(rows),
        max_steps=STEPS,
        optim="sgd",
        learning_rate=RATE / 4,  # of the head; the logits move four times as far
        lr_scheduler_type="linear",
        max_grad_norm=1e3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GKDTrainer(
        policy(torch.full((ANSWERS,), 0.25)),
        policy(TEACHER),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    probs = trainer.model(torch.tensor([[ANSWERS]])).logits[0, 0].softmax(-1)
    torch.testing.assert_close(probs[:ANSWERS], expected, rtol=0, atol=0.02)
