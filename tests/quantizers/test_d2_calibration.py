"""Calibration text."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from hf_rb import D2QuantConfig, tiny
from hf_rb.io.texts import read_texts
from hf_rb.quantizers.d2quant.calibrate.text import calibration_tokens, load_tokenizer, token_fingerprint


WORDS = "a farmer has three hens and every hen lays two eggs a day so how many eggs does she sell".split()
TEXTS = [" ".join(WORDS[i:] + WORDS[:i] + [str(i)]) for i in range(len(WORDS))]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.resolve("tiny:student"))


def tokens(tokenizer, dataset=TEXTS, **options):
    return calibration_tokens(
        D2QuantConfig(dataset=dataset, **({"num_samples": 4, "seqlen": 16} | options)), tokenizer
    )


def test_shape_and_seed(tokenizer):
    one = tokens(tokenizer)
    assert one.shape == (4, 16) and one.dtype == torch.int64
    assert torch.equal(one, tokens(tokenizer)) and not torch.equal(one, tokens(tokenizer, seed=1))
    assert token_fingerprint(one) == token_fingerprint(tokens(tokenizer))
    assert token_fingerprint(one) != token_fingerprint(tokens(tokenizer, seed=1))
    assert token_fingerprint(one) != token_fingerprint(one.view(2, 32))


def test_sequences_are_pieces_of_the_texts(tokenizer):
    text = " ".join(f"{i} hens." for i in range(200))
    joined, found = tokenizer(text)["input_ids"], tokens(tokenizer, [text]).tolist()
    starts = [start for start in range(0, len(joined) - 15, 16) if joined[start : start + 16] in found]
    assert len(starts) == 4  # of one long text, pieces without a gap, each once
    assert starts != [0, 16, 32, 48]  # and drawn from all of it


def test_files_and_lists_are_the_same(tokenizer, tmp_path):
    rows, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    text.write_text(" ".join(TEXTS))
    assert torch.equal(tokens(tokenizer, str(rows)), tokens(tokenizer))
    assert torch.equal(tokens(tokenizer, str(text)), tokens(tokenizer, [" ".join(TEXTS)]))


def test_embedded_problems(tokenizer):
    found = tokens(tokenizer, "tiny:math", num_samples=8, seqlen=64)
    assert "<|im_start|>user" in tokenizer.decode(found.flatten())


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (["  ", "\n"], {}, ValueError, "The calibration text is empty"),
        (TEXTS, {"num_samples": 4000}, ValueError, r"4000 sequences of 16 need 64,000. .* or write `num_samples=\d+`"),
        (["one two three"] * 3, {"seqlen": 1024}, ValueError, r"has \d+ tokens; .* or write `seqlen=\d`"),
        (["one two three"], {"seqlen": 1024}, ValueError, r"has \d tokens; .* need 4,096. Give more text\.$"),
        ("no/such/file.txt", {}, FileNotFoundError, "There is no file no/such/file.txt"),
        ("2 texts, sha256 00ff", {}, ValueError, "is the fingerprint of a list. Give the texts themselves"),
        (
            "a farmer has hens " * 99,
            {},
            ValueError,
            r"'a farmer .* is no file .* goes into a list: `dataset=\[text\]`",
        ),
    ],
)
def test_refusals(tokenizer, dataset, options, error, message):
    with pytest.raises(error, match=message):
        tokens(tokenizer, dataset, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "one"}\n', "has the columns question; one called `text` is needed"),
        ('{"text": "one"}\n{"text": null}\n', "has None in row 1; expected text"),
        ('{"text": "one"}\n{text}\n', "rows.jsonl holds no JSON lines: JSON parse error"),
        ("", "rows.jsonl holds no text"),
        ("\n\n", "rows.jsonl holds no text"),
    ],
)
def test_damaged_files(tokenizer, tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        tokens(tokenizer, str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(("option", "place"), [("num_samples", 0), ("seqlen", 1)])
def test_the_remedy_says_what_fits(tokenizer, option, place):
    with pytest.raises(ValueError) as error:
        tokens(tokenizer, **{option: 4000})
    found, _, fits = str(error.value).rpartition("`")[0].rpartition("`")[2].partition("=")
    assert found == option and tokens(tokenizer, **{option: int(fits)}).shape[place] == int(fits)


def test_tokenizers(tokenizer, tmp_path):
    class Model:
        name_or_path = str(tmp_path)

    given = D2QuantConfig(dataset=TEXTS, tokenizer=tokenizer)
    assert load_tokenizer(given, Model) is tokenizer
    named = D2QuantConfig(dataset=TEXTS, tokenizer="tiny:student")
    assert load_tokenizer(named, Model).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="There is no tokenizer in .* give `tokenizer=...`"):
        load_tokenizer(D2QuantConfig(dataset=TEXTS), Model)


def test_a_dataset_that_does_not_load_is_named_with_a_remedy():
    with pytest.raises(
        FileNotFoundError, match=r"wikitext2 is no file here, .* failed \(.*\)\. Write the path of a text file"
    ):
        read_texts("wikitext2", "test")
