"""Every sampler draws from the model's distribution, whatever the checkpoint's generation configuration would rather have."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList
from transformers.trainer_utils import set_seed

from hf_rb import DistillationConfig, DistillationTrainer, GKDConfig, GKDTrainer, GRPOConfig, GRPOTrainer, tiny
from hf_rb.evaluation import generate
from hf_rb.ops.generation import own_distribution, stop_tokens
from hf_rb.teachers import LocalTeacher


# Each of them changes what is drawn, or how.
INHERITED = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 3,
    "min_length": 40,
    "temperature": 9.0,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.5,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "bad_words_ids": [[5]],
    "suppress_tokens": [6],
    "begin_suppress_tokens": [7],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 8,
    "exponential_decay_length_penalty": (1, 2.0),
    "sequence_bias": [[[10], 9.0]],
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 5.0},
    "num_beams": 3,
    "num_beam_groups": 3,
    "length_penalty": 4.0,
    "early_stopping": True,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "dola_layers": "high",
    "max_time": 1e-9,
    "stop_strings": ["e"],
    "do_sample": False,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "a_field_of_a_later_version": 1,
}
STOPS = [7, 3]
DRAWS = 2000
NEUTRAL = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}


@pytest.fixture
def load(student):
    def load(**settings):
        model = AutoModelForCausalLM.from_pretrained(student)
        for name, value in (INHERITED | {"eos_token_id": STOPS} | settings).items():
            setattr(model.generation_config, name, value)
        return model

    return load


@pytest.fixture
def processors(monkeypatch):
    """Names of the processors of all logits since it was last cleared."""
    names, call = set(), LogitsProcessorList.__call__

    def recording(self, *args, **kwargs):
        names.update(type(one).__name__ for one in self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(LogitsProcessorList, "__call__", recording)
    return names


def gkd(load, config, tokenizer, **fields):
    args = GKDConfig(**config | {"lmbda": 1.0, "max_new_tokens": 4, "temperature": 1.0} | fields)
    return GKDTrainer(
        load(), args=args, train_dataset=tiny.load_dataset("math", config="messages", size=4),
        processing_class=tokenizer, teacher=LocalTeacher(load(), tokenizer=tokenizer),
    )  # fmt: skip


def distillation(load, config, tokenizer, **fields):
    args = DistillationConfig(**config | {"max_completion_length": 4, "temperature": 1.0} | fields)
    return DistillationTrainer(
        load(), load(), args, tiny.load_dataset("math", config="prompt_only", size=4).select_columns("prompt"),
        processing_class=tokenizer,
    )  # fmt: skip


def grpo(load, config, tokenizer, **fields):
    args = GRPOConfig(**config | {"max_completion_length": 4, "num_generations": 2} | fields)
    return GRPOTrainer(
        load(), lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids], args,
        tiny.load_dataset("math", config="prompt_only", size=4).select_columns("prompt"), processing_class=tokenizer,
    )  # fmt: skip


TRAINERS = {"gkd": gkd, "distillation": distillation, "grpo": grpo}


def check_frequencies(model, prompt, drawn):
    """
    Chi-square of the drawn ids against the softmax, over the ids that at least 5 draws are expected of and the rest together. Of a
    true sampler the statistic has the mean of its degrees of freedom f and the variance 2 f: 5 standard deviations.
    """
    with torch.no_grad():
        expected = DRAWS * model.eval()(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    assert len(drawn) == DRAWS
    found = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
    often = expected >= 5
    assert often.sum() > 10
    expected, found = (torch.cat([one[often], one[~often].sum().view(1)]) for one in (expected, found))
    freedom = len(expected) - 1
    assert ((found - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_inherit_only_the_stop_tokens(load, config, tokenizer, processors, name):
    trainer = TRAINERS[name](load, config | {"max_steps": 1}, tokenizer)
    inherited = trainer.model.generation_config
    kept = inherited.to_dict()
    trainer.train()
    assert processors <= NEUTRAL
    assert trainer.model.generation_config is inherited
    # transformers puts the tokenizer's stop token to the model's when it trains.
    assert inherited.to_dict() | {"eos_token_id": None} == kept | {"eos_token_id": None}
    eos = trainer.generation_config.eos_token_id
    assert [token for token in eos if token in STOPS] == STOPS  # in the checkpoint's order
    assert tokenizer.eos_token_id in eos


def test_a_teacher_that_writes_inherits_only_the_stop_tokens(load, config, tokenizer, processors):
    gkd(load, config | {"max_steps": 1}, tokenizer, lmbda=0.0, seq_kd=True, temperature=0.9).train()
    assert processors == {"TemperatureLogitsWarper"}


@pytest.mark.parametrize("name", TRAINERS)
def test_first_tokens_have_the_frequencies_of_the_softmax(load, config, tokenizer, name):
    trainer = TRAINERS[name](load, config, tokenizer)
    trainer.generation_config.max_new_tokens = 1
    prompt = tokenizer("Half of 14?")["input_ids"]
    set_seed(1)
    if name == "gkd":
        drawn = trainer._sample(trainer.model, [torch.tensor(prompt)] * DRAWS)
    elif name == "grpo":
        drawn, _ = trainer._generate_single_turn([prompt] * DRAWS, None, {}, 2)
    else:
        drawn = trainer._generate_single_turn([prompt] * DRAWS, None, {})
    check_frequencies(trainer.model, prompt, [int(row[0]) for row in drawn])


def test_evaluation_inherits_only_the_stop_tokens(load, tokenizer, processors):
    model = load()
    texts = generate(model, tokenizer, ["Half of 14?"], max_new_tokens=1, samples=DRAWS, temperature=1.0)[0]
    assert not processors
    prompt = tokenizer("Half of 14?")["input_ids"]
    with torch.no_grad():
        probs = model.eval()(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    # Texts, not ids: the most probable one, within 5 standard deviations of its binomial count.
    names = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(probs))]
    by_text = Counter()
    for text, prob in zip(names, probs.tolist(), strict=True):
        by_text[text] += prob
    found = Counter(text for text, _ in texts)
    for text, prob in by_text.most_common(5):
        assert abs(found[text] - DRAWS * prob) < 5 * (DRAWS * prob * (1 - prob)) ** 0.5
    generate(model, tokenizer, ["Half of 14?"], max_new_tokens=3)
    assert not processors


def test_greedy_evaluation_is_the_most_probable_token(load, tokenizer):
    model, prompt = load(), tokenizer("Half of 14?")["input_ids"]
    with torch.no_grad():
        best = model.eval()(torch.tensor([prompt])).logits[0, -1].argmax()
    [[completion]] = generate(model, tokenizer, ["Half of 14?"], max_new_tokens=1)
    assert completion.text == tokenizer.decode([best], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["grpo", "distillation"])
def test_what_the_user_asks_for_acts(load, config, tokenizer, processors, name):
    fields = {"generation_kwargs": {"no_repeat_ngram_size": 2}, "top_k": 20, "temperature": 0.8}
    TRAINERS[name](load, config | {"max_steps": 1}, tokenizer, **fields).train()
    assert processors == {"NoRepeatNGramLogitsProcessor", "TopKLogitsWarper", "TemperatureLogitsWarper"}


def test_the_context_ends_with_an_error(load):
    model = load()
    inherited = model.generation_config
    with pytest.raises(RuntimeError), own_distribution(model):
        assert model.generation_config.repetition_penalty is None and model.generation_config.eos_token_id == STOPS
        raise RuntimeError
    assert model.generation_config is inherited


def test_stop_tokens_keep_their_order(load, tokenizer):
    own = tokenizer.eos_token_id
    assert stop_tokens(load(), tokenizer) == [*STOPS, own]
    assert stop_tokens(load(eos_token_id=[own, 3]), tokenizer) == [own, 3]
    assert stop_tokens(load(eos_token_id=None), tokenizer) == [own]
    assert stop_tokens(load(eos_token_id=5), tokenizer) == [5, own]


def test_the_settings_above_would_act(load, tokenizer, processors):
    """Without the context they do: the tests above have something to see."""
    model = load()
    acting = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_p": 0.5}
    model.generation_config = GenerationConfig(**acting)
    call = {
        "inputs": torch.tensor([[20, 21]]),
        "generation_config": GenerationConfig(max_new_tokens=4, do_sample=True, top_k=0),
    }
    model.generate(**call)
    assert processors == {"RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "MinPLogitsWarper"}
    processors.clear()
    with own_distribution(model):
        model.generate(**call)
    assert not processors
