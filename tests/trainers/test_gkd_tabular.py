"""GKD in a world of one state, the same after every token, where each method's fixed point is known."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_rb import GKDConfig, GKDTrainer


ANSWERS = 4
TEACHER = torch.tensor([0.6, 0.2, 0.15, 0.05])
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


@pytest.fixture
def make(tokenizer, tmp_path):
    """Returns a function that makes a trainer of a student that starts uniform, or as given."""

    def make(rows, start=None, **config):
        args = GKDConfig(
            **{
                "output_dir": str(tmp_path),
                "per_device_train_batch_size": len(rows),
                "optim": "sgd",
                "lr_scheduler_type": "linear",
                "max_grad_norm": 1e3,
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "logging_steps": 100,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                **config,
            }
        )
        student = policy(torch.full((ANSWERS,), 0.25) if start is None else start)
        return GKDTrainer(
            student, policy(TEACHER), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )

    return make


def probs_of(trainer, model=None):
    with torch.no_grad():
        return (model or trainer.model)(torch.tensor([[ANSWERS]])).logits[0, 0].softmax(-1)[:ANSWERS]


@pytest.mark.parametrize("sample", [True, False])
def test_hpd_samples_recover_the_whole_teacher(make, sample):
    """The data only ever show the first answer. The drawn tokens recover the teacher's whole distribution, and nothing else does."""
    length = 512
    trainer = make(
        # Labels that are not the next tokens: the model does not see which token it reads.
        [{"input_ids": [ANSWERS] * (length + 1), "labels": [-100] + [0] * length}],
        objective="hpd",
        hpd_sample=sample,
        lmbda=0.0,
        max_steps=300,
        learning_rate=0.5,  # of the head; the logits move four times as far
    )
    trainer.train()
    expected = TEACHER if sample else torch.tensor([0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3])
    torch.testing.assert_close(probs_of(trainer), expected, rtol=0, atol=0.02)


PROMPTS = [{"input_ids": [ANSWERS, 0], "labels": [-100, 0]}] * 512


@pytest.mark.parametrize("scale, full", [(1.25, False), (1.25, True), (0.5, True)])
def test_gopd_converges_to_the_mixture_of_logits(make, scale, full):
    """The student goes to the mixture whose logits are λ z_T + (1 - λ) z_R."""
    start = torch.tensor([0.4, 0.3, 0.2, 0.1])
    trainer = make(
        PROMPTS,
        start,
        objective="gopd",
        reward_scale=scale,
        gopd_full_vocab=full,
        lmbda=1.0,
        temperature=1.0,
        max_new_tokens=1,
        max_steps=40,
        learning_rate=1.0,
    )
    trainer.train()
    expected = (scale * TEACHER.log() + (1 - scale) * start.log()).softmax(-1)
    torch.testing.assert_close(probs_of(trainer), expected, rtol=0, atol=0.02)

    reference = trainer.reference.model  # the student at its start, which did not move with it
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    torch.testing.assert_close(probs_of(trainer, reference), start, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_have_the_students_frequencies(make, temperature):
    trainer = make(PROMPTS, TEACHER, lmbda=1.0, temperature=temperature, max_new_tokens=8)
    samples = torch.cat(trainer._sample(trainer.model, [torch.tensor([ANSWERS])] * 512))
    expected = (TEACHER.log() / temperature).softmax(-1)
    frequencies = torch.bincount(samples, minlength=ANSWERS)[:ANSWERS] / len(samples)
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.03)
