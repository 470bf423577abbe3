"""What tokenizers put around a text, and that perplexity, calibration and training read windows that begin with it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import hf_rb
from hf_rb import D2QuantConfig
from hf_rb.cli import main
from hf_rb.evaluation import beginning, load_model, perplexity
from hf_rb.quantizers import Report
from hf_rb.quantizers.d2quant.calibrate.text import calibration_tokens
from hf_rb.recover import RecoverConfig, failures, pipeline
from hf_rb.recover.stages import _changes
from hf_rb.utils.special_tokens import cut, special_tokens


BOS, EOS = "<|im_start|>", "<|im_end|>"
TEXT = "Ava buys 3 pens at 4 coins each and pays with 20 coins. How many coins does Ava get back? Then 20 - 12 = 8."
STORIES = Path(hf_rb.__file__).parents[2] / "shared"


def adding(tokenizer, template):
    """A tokenizer that puts tokens around a text as tokenizers of published models do, by its post-processor."""
    changed = copy.deepcopy(tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS) if token in template]
    changed.backend_tokenizer.post_processor = TemplateProcessing(template, None, special)
    return changed


@pytest.fixture(scope="module")
def with_bos(tokenizer):
    return adding(tokenizer, f"{BOS} $A")


@pytest.mark.parametrize(
    ("template", "head", "tail", "name"),
    [
        ("$A", [], [], None),
        (f"{BOS} $A", [BOS], [], BOS),
        (f"$A {EOS}", [], [EOS], None),
        (f"{BOS} $A {EOS}", [BOS], [EOS], BOS),
        (f"{EOS} {BOS} $A", [EOS, BOS], [], f"{EOS} {BOS}"),
    ],
)
def test_the_tokenizer_itself_is_asked(tokenizer, template, head, tail, name):
    found = special_tokens(adding(tokenizer, template))
    ids = tokenizer.convert_tokens_to_ids
    assert found == (ids(head), ids(tail), name)
    own = tokenizer(TEXT)["input_ids"]
    assert found.around(own) == ids(head) + own + ids(tail) == found.around(found.around(own))


def test_a_tokenizer_that_changes_the_text_is_refused(tokenizer):
    class Strange:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 2, 3] if add_special_tokens else [9]}

    with pytest.raises(ValueError, match="Strange makes .9. of 'a' without special tokens and .1, 2, 3. with them"):
        special_tokens(Strange())


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=2), st.integers(3, 9))
def test_windows_hold_the_text_once_and_begin_with_one_head(ids, head, length):
    windows = list(cut(ids, head, length))
    assert all(len(window) == length and window[: len(head)] == head for window in windows)
    rest, position = [], 0
    for window in windows:
        own = window if ids[position : position + len(head)] == head else window[len(head) :]
        rest += own
        position += len(own)
    assert rest == ids[:position] and len(ids) - position < length


def test_no_room_behind_the_head():
    with pytest.raises(ValueError, match="A sequence of 2 tokens has no room for more than the 2 that it begins with"):
        list(cut([1, 2, 3], [8, 9], 2))


def plain_loop(model, tokenizer, text, window, stride):
    """As one writes it with transformers alone: a window with BOS in front of it, and the tokens that no earlier window scored."""
    (bos,), ids = special_tokens(tokenizer).head, tokenizer(text, add_special_tokens=False)["input_ids"]
    nats, scored, end = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        input_ids = torch.tensor([[bos, *ids[start : start + window]]])
        labels = input_ids.clone()
        labels[
            :, : 1 + max(end - start, 1)
        ] = -100  # BOS, what was scored before, and a token with nothing of the text before it
        count = int((labels != -100).sum())
        if count:
            with torch.no_grad():
                nats += model(input_ids, labels=labels).loss.item() * count
        scored, end = scored + count, min(start + window, len(ids))
        if end == len(ids):
            return nats / scored, scored


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (16, 5), (256, 256)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_perplexity_is_that_of_a_plain_loop(model, with_bos, window, stride, batch_size):
    nats, scored = plain_loop(model, with_bos, TEXT, window, stride)
    found = perplexity(model, with_bos, TEXT, window, stride, batch_size=batch_size)
    assert found.tokens == scored and found.begins_with == BOS
    assert found.nats_per_token == pytest.approx(nats, rel=1e-5)  # sums of float32 in another order


def test_the_same_tokens_are_scored_with_and_without(model, tokenizer, with_bos):
    without, given = (perplexity(model, one, TEXT, 8, 4) for one in (tokenizer, with_bos))
    assert (without.tokens, without.bytes_per_token) == (given.tokens, given.bytes_per_token)
    assert without.begins_with is None and without.nats_per_token != given.nats_per_token
    behind = perplexity(model, adding(tokenizer, f"$A {EOS}"), TEXT, 8, 4)
    assert behind == without  # EOS is no part of the text
    written = perplexity(model, with_bos, BOS + TEXT, 8, 4)  # a text that brings its own has it once
    assert written.nats_per_token == given.nats_per_token and written.tokens == given.tokens


def test_a_context_decides_for_itself(model, tokenizer, with_bos):
    """A rendered prompt begins with what its template says: then every window does, and else none."""
    answers = ["20 - 12 = 8. " * 8]
    template = perplexity(model, with_bos, answers, 16, 16, contexts=[BOS + TEXT])
    assert template.begins_with == BOS
    none = perplexity(model, with_bos, answers, 16, 16, contexts=[TEXT])
    assert none.begins_with is None and none == perplexity(model, tokenizer, answers, 16, 16, contexts=[TEXT])
    assert none.tokens == template.tokens and none.nats_per_token != template.nats_per_token


def test_windows_leave_room_and_beginnings_count_the_text_alone(model, tokenizer, with_bos):
    with pytest.raises(ValueError, match=r"window=512 with <\|im_start\|> in front of it .* write window=511"):
        perplexity(model, with_bos, TEXT, window=512)
    assert perplexity(model, with_bos, TEXT).window == perplexity(model, with_bos, TEXT, 511).stride == 511
    assert perplexity(model, tokenizer, TEXT).window == perplexity(model, tokenizer, TEXT).stride == 512
    assert beginning(with_bos, TEXT, 5) == beginning(tokenizer, TEXT, 5)


def test_calibration_and_training_windows(tokenizer, with_bos):
    texts = [f"{i} hens lay {2 * i} eggs a day, and {3 * i} foxes watch them." for i in range(40)]
    config, report = D2QuantConfig(dataset=texts, num_samples=8, seqlen=16), Report("d2quant")
    tokens, bos = calibration_tokens(config, with_bos, report), with_bos.convert_tokens_to_ids(BOS)
    assert report.begins_with == BOS and tokens.shape == (8, 16)
    assert (tokens[:, 0] == bos).all() and not (tokens[:, 1] == bos).any()
    calibration_tokens(config, tokenizer, report)
    assert report.begins_with is None
    two = adding(tokenizer, f"{EOS} {BOS} $A")
    with pytest.raises(ValueError, match=r"`seqlen=2` leaves no room for text: every sequence begins with"):
        calibration_tokens(D2QuantConfig(dataset=texts, num_samples=8, seqlen=2), two)
    rendered = D2QuantConfig(dataset="tiny:math", num_samples=8, seqlen=64)  # each conversation brings its own
    is_bos = calibration_tokens(rendered, with_bos) == bos
    assert is_bos[:, 0].all() and not (is_bos[:, 1:] & is_bos[:, :-1]).any()

    rows = failures.text_rows(adding(tokenizer, f"{BOS} $A {EOS}"), [" ".join(texts)], 16)
    assert all(row["input_ids"][0] == bos and row["labels"] == row["input_ids"] for row in rows)
    plain, ids = failures.text_rows(tokenizer, [" ".join(texts)], 16), tokenizer(" ".join(texts))["input_ids"]
    assert [row["input_ids"] for row in plain] == [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]


@pytest.fixture(scope="module")
def folders(model, tokenizer, with_bos, tmp_path_factory):
    """The same model with two tokenizers."""
    folders = []
    for name, one in (("plain", tokenizer), ("bos", with_bos)):
        folders.append(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[-1])
        one.save_pretrained(folders[-1])
    return folders


def test_results_of_another_convention_are_not_taken_over(folders, tmp_path):
    """Stages of `hf-rb recover` that an earlier version has measured without BOS are done again, and no others."""
    for name in ("held-out", "train"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: {TEXT}")
    texts = {"eval_text": str(tmp_path / "held-out.txt"), "train_text": str(tmp_path / "train.txt")}
    plain, bos = (
        pipeline._Pipeline(
            RecoverConfig(model_name_or_path=str(folder), output_dir=str(tmp_path / folder.name), **texts),
            lambda line: None,
        )
        for folder in folders
    )
    assert plain._measuring("weights")["special_tokens"] is None and plain.report.begins_with is None
    before = {"weights": "w", "questions": "q", "dtype": "auto"}
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "inputs.json").write_text(json.dumps(before))
    assert _changes(folder, before | {"special_tokens": plain._special_tokens}) is False
    assert _changes(folder, before | {"special_tokens": bos._special_tokens}) == ", again (special_tokens changed)"
    assert bos.report.begins_with == BOS


def test_verbs_say_it(folders, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "eval.json"
    text.write_text(TEXT * 5)
    for folder in folders:
        measured = ["--perplexity", str(text), "--window", "64", "--out", str(out), "--overwrite"]
        assert main(["eval", str(folder), *measured]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert main(["eval", str(folder), "--perplexity", str(text)]) == 0
        window = 511 if folder is folders[1] else 512  # unasked, as much as fits beside BOS
        assert f"perplexity, window {window}, stride {window} " in " ".join(capsys.readouterr().out.split())
        metric = json.loads(out.read_text())["results"][0]["metric"]
        is_said = folder is folders[1]
        assert (f"each window begins with {BOS}" in printed) == is_said
        assert (f"stride 64, each begins with {BOS}," in metric) == is_said
        small = ["--method", "d2quant", "--no-rotate", "--num-samples", "4", "--seqlen", "32", "--dataset", str(text)]
        for measured in ([], ["--eval-data", str(text)]):
            assert main(["quantize", str(folder), str(tmp_path / "out"), "--overwrite", *small, *measured]) == 0
            printed = " ".join(capsys.readouterr().out.split())
            said = f"{'window' if measured else 'sequence'} begins with {BOS}"
            assert (said in printed) == is_said
        card = (tmp_path / "out" / "README.md").read_text()
        assert (f"(each window begins with `{BOS}`)" in card) == is_said


@pytest.mark.skipif(not STORIES.is_dir(), reason="real models that were trained with BOS")
@pytest.mark.parametrize("name", ["stories260k", "tinystories-656k"])
def test_real_models_beside_a_plain_loop(name):
    model, tokenizer = load_model(STORIES / "models" / name)
    text = beginning(tokenizer, (STORIES / "data/tinystories_a.txt").read_text(), 2000)
    found = perplexity(model, tokenizer, text, 32)
    added = special_tokens(tokenizer)
    assert added[:2] == ([tokenizer.bos_token_id], [])
    nats, scored = plain_loop(model, tokenizer, text, 32, 32)
    assert found.begins_with == added.name and found.tokens == scored
    assert found.nats_per_token == pytest.approx(nats, rel=1e-5)
