"""Calibration sets by name: optimum's own function, whose texts come from the Hub."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from optimum.gptq import data
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from hf_rb import D2QuantConfig, tiny
from hf_rb.cli import main
from hf_rb.quantizers.d2quant.calibrate.named_sets import NAMED_SETS
from hf_rb.quantizers.d2quant.calibrate.text import calibration_tokens


BOS = "<|im_start|>"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.resolve("tiny:student"))


@pytest.fixture
def texts(monkeypatch):
    """Texts in place of those of the Hub."""
    rows = [f"{i} hens lay {2 * i} eggs a day, and {3 * i} foxes watch them. " * (i % 7) for i in range(60)]
    monkeypatch.setattr(data, "load_dataset", lambda *names, **options: Dataset.from_dict({"text": rows}))


def drawn(tokenizer, name, **options):
    return calibration_tokens(D2QuantConfig(dataset=name, **{"num_samples": 6, "seqlen": 32} | options), tokenizer)


@pytest.mark.parametrize("name", NAMED_SETS)
def test_they_are_drawn_as_gptq_draws_them(tokenizer, texts, name):
    expected = torch.cat([one["input_ids"] for one in data.get_dataset(name, tokenizer, 6, 32, seed=5)])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    found = drawn(tokenizer, name, seed=5)
    assert torch.equal(found, expected) and found.dtype == torch.int64
    assert (random.random(), np.random.rand(), torch.rand(1)) == states
    assert not torch.equal(found, drawn(tokenizer, name, seed=6))


def test_each_begins_as_the_tokenizer_begins_a_text(tokenizer, texts):
    plain, bos = drawn(tokenizer, "wikitext2", seqlen=31), tokenizer.convert_tokens_to_ids(BOS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{BOS} $A", None, [(BOS, bos)])
    found = drawn(tokenizer, "wikitext2")
    assert (found[:, 0] == bos).all() and torch.equal(found[:, 1:], plain)


def test_a_file_of_that_name_comes_first(tokenizer, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").write_text("seven red cups " * 400)
    assert "seven red cups" in tokenizer.decode(drawn(tokenizer, "c4").flatten())


def test_without_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    small = ["--num-samples", "2", "--seqlen", "16", "--dataset", "c4"]
    assert main(["quantize", "tiny:student", str(tmp_path / "out"), "--method", "d2quant", *small]) == 2
    error = capsys.readouterr().err
    assert "`dataset='c4'` is loaded by optimum from the Hub, which failed (" in error
    assert "give `dataset` a text file, a JSON-lines file with the column `text` or a list of texts instead." in error
    assert not list(tmp_path.iterdir())
