"""`hf_rb.quantizers.quantize` and `hf-rb quantize`."""

import argparse
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_rb import PTQTPConfig, tiny
from hf_rb.cli import main
from hf_rb.cli import quantize as verb
from hf_rb.io.resources import resource_folder
from hf_rb.quantizers import quantize
from hf_rb.quantizers.packed.baseline import round_to_nearest, rtn
from hf_rb.quantizers.ptqtp import PTQTPLinear


@pytest.fixture
def source(make_model, tmp_path_factory):
    folder = shutil.copytree(make_model(), tmp_path_factory.mktemp("with") / "companions")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def quantized_modules(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [name for name, module in model.named_modules() if isinstance(module, PTQTPLinear)]


def test_quantize_copies_companions_and_reports_its_bytes(source, tmp_path):
    report = quantize(source, tmp_path / "out", PTQTPConfig(), dtype="float32")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert len(quantized_modules(tmp_path / "out")) == 14
    weights = tmp_path / "out" / "model.safetensors"
    assert report.file_bytes == weights.stat().st_size
    assert report.bits_per_weight == 8 * report.file_bytes / report.parameters
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_card(source, tmp_path):
    quantize(source, tmp_path / "student-ptqtp", PTQTPConfig(group_size=64))
    card = (tmp_path / "student-ptqtp" / "README.md").read_text()
    for expected in (
        "# student-ptqtp",
        "2509.16989",
        "import hf_rb  # registers the format",
        "| `group_size` | `64` |",
        f"Made from `{source.name}`",
        "bits per weight**",
    ):
        assert expected in card
    assert str(source.parent) not in card and "`packing`" not in card


def test_verb_ptqtp_writes_a_folder_that_loads(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "--no-qk", "--skip", "down_proj", "--packing", "nibble"]) == 0
    printed = capsys.readouterr().out
    assert "gate_proj" in printed and "true bits per weight" in printed and "2 down_proj, " in printed
    assert "4-bit rounding (group 128) would be" in printed
    measured = (out / "README.md").read_text().partition("## Measured by `hf-rb quantize`\n\n")[2]
    assert "4-bit rounding (group 128) would be" in measured.partition("\n\n## ")[0]
    names = quantized_modules(out)
    assert names and not any(name.endswith(("q_proj", "k_proj", "down_proj")) for name in names)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["packing"] == "nibble" and config["quantize_qk"] is False


def test_verb_json(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "out"), "--group-size", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == 14 and report["method"] == "ptqtp" and report["bits_per_weight"] > 3
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report  # what `hf-rb report` reads


def test_report_beside_4_bit_rounding(source, tmp_path):
    report = quantize(source, tmp_path / "out", PTQTPConfig(packing="nibble"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    packed = [name for name, tensor in stored.items() if tensor.dtype == torch.uint8]
    ours = sum(tensor.nbytes for name, tensor in stored.items() if name in packed or name[: -len("_scale")] in packed)
    # 4 bits a weight; a 16-bit scale and a 4-bit zero point for each group of 128, and for the short one.
    original = load_file(source / "model.safetensors")
    shapes = [original[name].shape for name in packed]
    theirs = sum((4 * rows * columns + 20 * rows * -(-columns // 128)) // 8 for rows, columns in shapes)
    assert report.baseline_file_bytes == report.file_bytes - ours + theirs
    assert report.quantized_bits_per_weight == pytest.approx(
        8 * ours / sum(rows * columns for rows, columns in shapes)
    )
    assert 0.155 < report.error() < 0.175 and 0.09 < report.error("baseline_error") < 0.105
    assert report.source_bytes == (source / "model.safetensors").stat().st_size
    assert report.verdict().startswith(
        "Prefer another format for this model: plain 4-bit rounding (group 128) would be more"
    )
    dense = quantize(source, tmp_path / "dense", PTQTPConfig())
    larger = dense.baseline_file_bytes / dense.file_bytes - 1
    assert 0.05 < larger < 0.2 and dense.verdict().endswith(f"in a file {larger:.1%} larger.")


def test_round_to_nearest():
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    for bits, expected in ((3, 0.21), (4, 0.0995)):
        rounded = round_to_nearest(weight, bits)
        assert torch.equal(rounded[3], weight[3])
        assert ((rounded - weight).norm() / weight.norm()).item() == pytest.approx(expected, abs=0.012)
        group = rounded[0, :128].unique()
        assert len(group) <= 2**bits and torch.allclose(
            group.diff() / group.diff().min(), (group.diff() / group.diff().min()).round(), atol=1e-3
        )
    assert round_to_nearest(rounded).sub(rounded).abs().max() < 1e-2
    error, size = rtn(weight)
    assert error == pytest.approx(((round_to_nearest(weight) - weight).norm() / weight.norm()).item())
    assert size == 64 * (192 // 2) + 64 * 2 * 20 // 8


@pytest.mark.parametrize("kind", ["text", "jsonl", "tiny:math"])
def test_perplexity_before_and_after(tmp_path, capsys, kind):
    data = tmp_path / f"stories.{kind}"
    text = "A farm has 12 cows and 7 goats. How many animals are there? " * 20
    data.write_text(json.dumps({"text": text}) + "\n" if kind == "jsonl" else text)
    arguments = ["quantize", "tiny:student", str(tmp_path / "out")]
    arguments += ["--stream"] if kind == "tiny:math" else ["--eval-data", str(data)]  # the default for a model of ours
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["eval_data"] == ("tiny:math" if kind == "tiny:math" else data.name)
    before, after = report["perplexity_before"], report["perplexity_after"]
    assert 1 < before < after if kind == "tiny:math" else before != after  # the text is nothing it has learnt
    # 4-bit rounding is always measured; on text that the model has learnt it is between the two
    assert report["rounding_seconds"] > 0 and report["bits_before"] in (16, 32) and report["begins_with"] is None
    if kind == "tiny:math":
        assert report["perplexity_rounded"] < after
    assert report["quality"]["times"] == after / before and report["quality"]["word"] in report["quality"]["sentence"]
    assert report["verdict"] and report["layers"][0]["baseline_error"] < report["layers"][0]["relative_error"]


def test_bad_evaluation_data_is_told_before_the_work(source, tmp_path, capsys):
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--eval-data"]
    assert main([*arguments, str(tmp_path / "no.txt")]) == 2
    assert "no.txt', which does not exist" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "?"}) + "\n")
    assert main([*arguments, str(tmp_path / "rows.jsonl")]) == 2
    assert "one called `text` is needed" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text(" ")
    assert main([*arguments, str(tmp_path / "empty.txt")]) == 2
    assert "holds no text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["quantize", "upcycle"])
def test_what_paths_tell_costs_no_torch(tmp_path, name):
    """A destination that is taken is refused before anything heavy is imported."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    program = (
        "import sys; from hf_rb.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", program, name, "tiny:student", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "is not empty" in result.stderr


def test_recipe_with_an_argument_over_it(source, tmp_path):
    recipe = {"model_name_or_path": str(source), "output_dir": str(tmp_path / "unused")}
    recipe["quantization_config"] = {"quant_method": "ptqtp", "group_size": 64}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--config", str(tmp_path / "recipe.yaml")]
    assert main([*arguments, "--packing", "nibble"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 64 and config["packing"] == "nibble"
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("name", ["tiny-cpu", "qwen3-0.6b", "qwen3-8b", "qwen3-8b-gptq"])
def test_shipped_recipes(name):
    recipe = yaml.safe_load((resource_folder("recipes") / "ptqtp" / f"{name}.yaml").read_text())
    arguments = verb.QuantizeArguments(**recipe)
    assert isinstance(PTQTPConfig.from_dict(arguments.quantization_config), PTQTPConfig)
    tiny.resolve(arguments.model_name_or_path)


def test_refuses_a_folder_that_is_not_empty(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("precious")
    assert main(["quantize", str(source), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["config.json"] and (out / "config.json").read_text() == "precious"
    assert main(["quantize", str(source), str(out), "--overwrite"]) == 0
    assert quantized_modules(out)


def test_refuses_to_replace_its_source(source):
    with pytest.raises(ValueError, match="holds the model that the result is made from"):
        quantize(source, source, PTQTPConfig(), overwrite=True)
    with pytest.raises(ValueError, match="holds the model that the result is made from"):
        quantize(source, source.parent, PTQTPConfig(), overwrite=True)


def test_refuses_a_quantized_model(source, tmp_path, capsys):
    quantize(source, tmp_path / "one", PTQTPConfig())
    assert main(["quantize", str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert "is quantized with ptqtp already" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_interrupted_save_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(self, folder, **kwargs):
        save(self, folder, **kwargs)
        raise KeyboardInterrupt

    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out" / "model", PTQTPConfig())
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"model_name_or_path": "a", "output_dri": "b"}, "unknown key `output_dri`; did you mean `output_dir`"),
        ({"model_name_or_path": "a"}, "`output_dir` is missing"),
        ({"model_name_or_path": "a"}, "Write `hf-rb quantize MODEL DEST`"),
        ({"model_name_or_path": "a", "output_dir": "b", "quantization_config": "ptqtp"}, "must be dict; got 'ptqtp'"),
        (
            {
                "model_name_or_path": "a",
                "output_dir": "b",
                "quantization_config": {"modules_to_not_convert": "lm_head"},
            },
            "`quantization_config.modules_to_not_convert` must be list[str] or null; got 'lm_head'",
        ),
        ({"model_name_or_path": "a", "output_dir": "b", "dtype": "int8"}, "`dtype` cannot be 'int8'"),
    ],
)
def test_bad_recipes(tmp_path, capsys, recipe, message):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["quantize", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model", "{out}"], "no/such/model"),
        (["tiny:giant", "{out}"], "tiny:student"),
        (["{source}", "{out}", "--skip", "nothing_like_it"], "matches no module"),
        (["{source}", "{out}", "--group-size", "0"], "`quantization_config.group_size` must be in [1, inf)"),
        ([], "`model_name_or_path` is missing"),
        (["{source}", "{out}", "--no-resume"], "is for streaming and calibration: add `stream=True` (`--stream`)"),
    ],
)
def test_bad_arguments(source, tmp_path, capsys, arguments, message):
    arguments = [argument.format(source=source, out=tmp_path / "out") for argument in arguments]
    assert main(["quantize", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verb_reaches_every_option_of_the_solver():
    parser = argparse.ArgumentParser()
    verb.configure(parser)
    options = "--planes-per-layer o_proj=1 down_proj=3 --tol-mode relative --multistart --activations int8".split()
    config = verb.read_arguments(parser.parse_args(["model", "out", *options])).quantization_config
    expected = {"planes_per_layer": {"o_proj": 1, "down_proj": 3}, "tol_mode": "relative", "multistart": True}
    assert config == {"quant_method": "ptqtp"} | expected | {"activations": "int8"}


def test_planes_that_are_no_number(capsys):
    assert main(["quantize", "model", "out", "--planes-per-layer", "down_proj"]) == 2
    assert "expected PATTERN=N, for instance down_proj=3; got 'down_proj'" in capsys.readouterr().err


def test_verb_is_cheap_to_describe():
    parser = argparse.ArgumentParser()
    verb.configure(parser)
    assert "--no-qk" in parser.format_help()
