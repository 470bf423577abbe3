"""`hf-rb quantize --method d2quant`."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GemmaForCausalLM

from hf_rb import D2QuantConfig, tiny
from hf_rb.cli import INTERRUPTED, main
from hf_rb.cli import quantize as verb
from hf_rb.io.resources import resource_folder
from hf_rb.quantizers.d2quant.calibrate import pipeline
from hf_rb.quantizers.d2quant.layers import D2QuantLinear
from hf_rb.quantizers.folders import quantize as offline


TEXTS = [f"{i} hens lay {2 * i} eggs a day, and {3 * i} foxes watch them from the hill." for i in range(80)]
SMALL = "--group-size 64 --num-samples 4 --seqlen 64 --batch-size 2".split()


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "private" / "texts.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def quantize(*arguments):
    return main(["quantize", "--method", "d2quant", *map(str, arguments)])


def test_verb_d2quant_writes_a_folder_that_loads(data, tmp_path, capsys):
    out = tmp_path / "student-d2quant"
    assert quantize("tiny:student", out, "--dataset", data, *SMALL) == 0
    printed = capsys.readouterr().out
    for expected in (
        "decoder layer",
        "model.layers.3",
        "model.norm",
        "they fall by the square of the mean, to within",
        "2.",
        "perplexity",
    ):
        assert expected in printed
    assert "that makes up for them.\n" in printed  # and no advice to measure what has been
    assert "solved a second time" not in printed and not list(tmp_path.glob(".*.partial"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(isinstance(module, D2QuantLinear) for module in model.modules()) == 28
    card, config = (out / "README.md").read_text(), (out / "config.json").read_text()
    assert "2602.02546" in card and "| `group_size` | `64` |" in card and "| `dataset` | `texts.jsonl` |" in card
    assert not any(str(tmp_path) in text for text in (card, config)) and "bias_modules" not in card
    assert card.count("## Measured by `hf-rb quantize`\n\nPerplexity on `") == 1 and "Not compared" not in card
    assert "Calibrated quantization by GPTAQ to 2 bits, with a second scale" in card


def test_killed_and_resumed(data, tmp_path, capsys, monkeypatch):
    out, arguments = tmp_path / "out", ("--dataset", data, *SMALL, "--no-rotate")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Calibration, "_final_shift", stop)  # in the last layer
        assert quantize("tiny:student", out, *arguments) == INTERRUPTED
    kept = tmp_path / ".out.partial"
    assert len(list(kept.glob("layer-*.safetensors"))) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"private", kept.name}  # nothing else to be left by a kill
    assert quantize("tiny:student", out, *arguments, "--seed", 5) == 2
    assert "calibration tokens was" in capsys.readouterr().err
    assert quantize("tiny:student", out, *arguments) == 0 and not kept.exists()


def test_the_advice_of_a_refusal_works(data, tmp_path, capsys):
    """In the same destination, also where an older version has left a folder with nothing done in it."""
    source, out, partial = tmp_path / "gemma", tmp_path / "out", tmp_path / ".out.partial"
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny.resolve("tiny:student"))
    config = GemmaConfig(**sizes, head_dim=32, vocab_size=len(tokenizer), pad_token_id=None)
    GemmaForCausalLM(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    arguments = source, out, "--dataset", data, *SMALL
    assert quantize(*arguments) == 2
    printed = capsys.readouterr().err
    assert "GemmaForCausalLM is none" in printed and "(`--no-rotate`)" in printed and "What is done" not in printed
    assert not partial.exists() and not out.exists()
    partial.mkdir()
    (partial / "state.json").write_text(json.dumps({"files": {}, "options": {"rotate": "block_hadamard"}}))
    assert quantize(*arguments, "--no-rotate") == 0 and out.is_dir() and not partial.exists()


def test_a_run_that_fails_at_its_start_leaves_no_folder(data, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no memory")

    monkeypatch.setattr(pipeline.rotation, "fuse_and_rotate", fail)
    assert quantize("tiny:student", tmp_path / "out", "--dataset", data, *SMALL) == 2
    assert "no memory" in (printed := capsys.readouterr().err) and "What is done" not in printed
    assert {path.name for path in tmp_path.iterdir()} == {"private"}


def test_missing_columns_cost_no_torch(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "?", "answer": "!"}) + "\n")
    program = (
        "import sys; from hf_rb.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    command = [
        sys.executable,
        "-c",
        program,
        *"quantize tiny:student out --method d2quant --dataset".split(),
        str(rows),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 2
    assert "has the columns question, answer; one called `text` is needed: rename" in result.stderr
    with pytest.raises(ValueError, match="has the columns question, answer"):  # from Python, too, before the model
        AutoModelForCausalLM.from_pretrained(
            tiny.resolve("tiny:student"), quantization_config=D2QuantConfig(dataset=str(rows))
        )


def test_the_recipe_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", "--config", "d2quant/tiny-cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["blocks"]) == 4 and report["eval_data"] == "tiny:math"
    assert report["perplexity_before"] < report["perplexity_after"] < 1.05 * report["perplexity_before"]
    quantized = load_file(tmp_path / "outputs" / "d2quant-tiny" / "model.safetensors")
    assert quantized["model.layers.0.mlp.down_proj.weight_scale"].shape[-1] == 3  # planes


def test_shipped_recipes():
    paths = list((resource_folder("recipes") / "d2quant").glob("*.yaml"))
    assert {path.stem for path in paths} == {"tiny-cpu", "qwen3-8b"}
    for path in paths:
        config = verb.QuantizeArguments(**yaml.safe_load(path.read_text())).quantization_config
        assert D2QuantConfig.from_dict(config).calibrated


def test_round_to_nearest_by_sensitivity_in_memory_and_streamed(tmp_path, capsys):
    folder = tiny.resolve("tiny:student")  # without the perplexity of an embedded model
    arguments = ("--backend", "rtn", "--group-size", 64, "--bits-per-layer", "nsds:3.0")
    tables = []
    for name, more in (("one", []), ("two", ["--stream"])):
        assert quantize(folder, tmp_path / name, *arguments, *more) == 0
        printed = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(printed) if line.startswith("decoder layer (NSDS)"))
        assert printed[start].split()[3:] == ["numerical", "structural", "sensitivity", "bits"]
        tables.append(printed[start : start + 6])
    rows = [line.split() for line in tables[0][2:]]
    assert tables[0] == tables[1] and sorted(row[0] for row in rows) == [f"model.layers.{i}" for i in range(4)]
    assert [row[-1] for row in rows] == ["4", "4", "2", "2"]  # the most sensitive ones first
    card = (tmp_path / "one" / "README.md").read_text()
    assert (
        "Rounding without calibration to 2 and 4 bits, with a second scale for the columns of down projections, absorbed where "
        "that is exact." in card
    )
    assert (
        "Calibrated" not in card and "| `backend` | `rtn` |" in card and "`rotate`" not in card and "`dac`" not in card
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_folder_for_unfinished_work(data, tmp_path):
    """One that is given is kept, with what it holds; one configuration serves two calls, and one that holds other files none."""
    kept, source = tmp_path / "kept", tiny.resolve("tiny:student")
    sizes = dict(num_samples=2, seqlen=32, group_size=64, dac=False, dsq=False)
    config = D2QuantConfig(dataset=str(data), resume_dir=str(kept), **sizes)
    first = offline.quantize(source, tmp_path / "one", config)
    layers = sorted(kept.glob("layer-*.safetensors"))
    stamps = [layer.stat().st_mtime_ns for layer in layers]
    again = offline.quantize(source, tmp_path / "two", config)
    assert len(layers) == 4 and stamps == [layer.stat().st_mtime_ns for layer in layers]
    assert [block.hidden_error for block in first.blocks] == [block.hidden_error for block in again.blocks]
    offline.quantize(source, tmp_path / "three", config, resume=False)
    assert stamps != [layer.stat().st_mtime_ns for layer in layers]
    assert config.resume_dir == str(kept) and not list(tmp_path.glob(".*.partial"))
    precious = D2QuantConfig(dataset=str(data), resume_dir=str(data.parent), **sizes)
    with pytest.raises(
        ValueError, match="private'` holds texts.jsonl, which is no unfinished work. Give a folder of its own"
    ):
        offline.quantize(source, tmp_path / "four", precious)
    assert data.is_file() and not (tmp_path / "four").exists()


def test_progress(data, tmp_path, capsys, monkeypatch):
    shown = {"disable": False, "mininterval": 0, "miniters": 1}  # as on a terminal, and every step
    monkeypatch.setattr(pipeline, "tqdm", lambda *args, **options: tqdm(*args, **options | shown))
    assert quantize(tiny.resolve("tiny:student"), tmp_path / "out", "--dataset", data, *SMALL, "--no-dac") == 0
    bars = [line for line in capsys.readouterr().err.split("\r") if line.startswith("quantize")]
    assert any(re.search(r"1/4 \[\d\d:\d\d<\d\d:\d\d, .*error 0\.\d{3}\]", line) for line in bars)  # the time left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs calibration text: write `dataset='texts.jsonl'`"),
        (["--dataset", "tiny:math", "--stream"], "a calibrated run needs the model"),
        (["--backend", "rtn", "--no-resume"], "is for streaming and calibration"),
        (["--dataset", "tiny:math", "--planes", "3"], "this method has `bits` (`--bits`)."),
        (["--dataset", "no/such/texts.txt"], "`dataset` names 'no/such/texts.txt', which does not exist"),
        (
            ["--dataset", "tiny:math", "--seqlen", "1025"],
            "longer than the 1024 positions of the model: write `seqlen=1024` (`--seqlen 1024`)",
        ),
        (
            ["--dataset", "tiny:math", "--num-samples", "100000", "--seqlen", "1024"],
            "Give more text, or write `num_samples=",
        ),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    assert quantize("tiny:student", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verb_reaches_the_options():
    parser = argparse.ArgumentParser()
    verb.configure(parser)
    options = "--method d2quant --bits 3 --backend gptq --dataset tiny:math --bits-per-layer down_proj=4 --no-dsq --no-dac --no-rotate"
    config = verb.read_arguments(parser.parse_args(["model", "out", *options.split()])).quantization_config
    paper = verb.read_arguments(
        parser.parse_args("model out --method d2quant --dataset x --dsq-weighting none".split())
    )
    assert paper.quantization_config["dsq_weighting"] == "none"
    expected = {"quant_method": "d2quant", "bits": 3, "backend": "gptq", "dataset": "tiny:math"}
    assert config == expected | {"bits_per_layer": {"down_proj": 4}, "dsq": False, "dac": False, "rotate": False}
