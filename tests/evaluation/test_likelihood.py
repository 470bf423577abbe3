import copy
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from hf_rb.evaluation import beginning, load_task, perplexity, solutions


TEXTS = [
    "Ava buys 3 pens at 4 coins each and pays with 20 coins. How many coins does Ava get back? Then 20 - 12 = 8.",
    "There are 7 red, 9 blue and 12 green cups.",
]


def naive(model, ids, window, stride, skip=0):
    """One forward pass for each scored token: the log-likelihood behind the context that its window gives it."""
    nats = {}
    for start in range(0, len(ids), stride):
        chunk = ids[start : start + window]
        for position in range(1, len(chunk)):
            if start + position >= skip and start + position not in nats:
                with torch.no_grad():
                    logits = model(torch.tensor([chunk[:position]])).logits[0, -1]
                nats[start + position] = -logits.log_softmax(-1)[chunk[position]].item()
        if start + window >= len(ids):
            break
    return list(nats.values())


def test_the_beginning_of_a_text(tokenizer):
    text = TEXTS[0]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer(beginning(tokenizer, text, 5))["input_ids"] == ids[:5] and beginning(tokenizer, text) == text
    ending = copy.deepcopy(tokenizer)  # as tokenizers have it that add a token at the end
    ending.backend_tokenizer.post_processor = TemplateProcessing("$A <|im_end|>", None, [("<|im_end|>", 1)])
    assert len(ending(text)["input_ids"]) == len(ids) + 1 and beginning(ending, text) == text


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (16, 5), (256, 256), (7, 7)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_equals_a_naive_loop(model, tokenizer, window, stride, batch_size):
    expected = [n for text in TEXTS for n in naive(model, tokenizer(text)["input_ids"], window, stride)]
    result = perplexity(model, tokenizer, TEXTS, window=window, stride=stride, batch_size=batch_size)
    assert result.tokens == len(expected)
    assert result.nats_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))


def test_overlapping_windows_score_each_token_but_the_first_once(model, tokenizer):
    length = len(tokenizer(TEXTS[0])["input_ids"])
    assert perplexity(model, tokenizer, TEXTS[0], window=8, stride=4).tokens == length - 1
    assert perplexity(model, tokenizer, TEXTS[0], window=8, stride=8).tokens == length - math.ceil(length / 8)


def test_contexts_are_read_and_not_scored(model, tokenizer):
    context = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    ids = tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]
    for window, stride in ((256, 256), (16, 4)):
        expected = naive(model, context + ids, window, stride, skip=len(context))
        result = perplexity(model, tokenizer, [TEXTS[1]], window, stride, contexts=[TEXTS[0]])
        assert result.tokens == len(expected) == len(ids)
        assert result.nats_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_bytes(model, tokenizer):
    text = "naïve Ünïcödé 7 + 9 = 16"
    result = perplexity(model, tokenizer, text)
    assert result.bytes_per_token == len(text.encode()) / len(tokenizer(text)["input_ids"])
    assert result.bits_per_byte == pytest.approx(result.nats_per_token / math.log(2) / result.bytes_per_token)


def test_solutions_are_the_assistants_turns(tokenizer):
    rows = load_task("tiny:math", limit=3)
    for row, text, context in zip(rows, *solutions(tokenizer, rows), strict=True):
        assert context.endswith("<|im_start|>assistant\n") and row["prompt"][0]["content"] in context
        assert text == row["solution"] + "<|im_end|>\n"


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer, monkeypatch):
    template = "{% for message in messages %}{{ loop.length }}{{ message.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="cannot be told apart"):
        solutions(tokenizer, load_task("tiny:math", limit=1))


def test_leaves_the_mode_of_the_model_alone(model, tokenizer):
    model.train()
    perplexity(model, tokenizer, TEXTS)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 8, "stride": 9}, "1 <= stride <= window"),
        ({"window": 8, "stride": 0}, "1 <= stride <= window"),
        ({"window": 513}, "write window=512"),
    ],
)
def test_refuses_windows_that_do_not_fit(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, TEXTS, **arguments)


def test_refuses_texts_with_nothing_to_score(model, tokenizer):
    with pytest.raises(ValueError, match="nothing to score"):
        perplexity(model, tokenizer, ["", "7"])
