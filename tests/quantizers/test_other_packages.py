"""A quantizer of another package, from the command line to the card; `test_conformance.py` has what it computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.example_package import FOLDER, installed
from helpers.plugins import install
from helpers.round_trips import load

from hf_rb.cli import main
from hf_rb.cli.check import check
from hf_rb.hub.loading import Loading
from hf_rb.methods.registry import broken, methods
from hf_rb.recover.pipeline import _title
from hf_rb.scripts.doctor.trials import quantization_trials


@pytest.fixture
def example(tmp_path):
    (tmp_path / "site").mkdir()
    with installed(tmp_path / "site"):
        yield


RECIPE = {"model_name_or_path": "tiny:student", "output_dir": "out"}


def errors(**config):
    return check(Path("recipe.yaml"), RECIPE | {"quantization_config": config}, "quantize").errors


def test_installed_by_pip(tmp_path):
    """In a process of its own, which imports neither torch nor the package to say what its flags are."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", tmp_path / "site", FOLDER], check=True, timeout=300)
    program = "import sys; from hf_rb.cli import main; main(sys.argv[1:]); print({'torch', 'hf_rb_example'} & {*sys.modules})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)])}
    command = [sys.executable, "-c", program, "quantize", "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path).stdout
    assert "d2quant,ptqtp,quartet" in shown and shown.endswith("set()\n")
    assert "Quartet:" in shown and "--clip CLIP" in shown and "(default 0.8)" in shown
    assert "--group-size" in shown.partition("D²Quant:")[0]  # what several methods have is said once


def test_flags_are_checked_before_anything_is_loaded(example):
    assert not errors(quant_method="quartet", clip=0.5)
    assert errors(quant_method="quartet", clip=2) == ["`quantization_config.clip` must be in (0, 1]; got 2."]
    (said,) = errors(quant_method="quartet", group_size=6)
    assert (
        said == "`quantization_config`: `group_size` must be a multiple of 4, so that a group fills its bytes; got 6."
    )
    (said,) = errors(quant_method="quartet", clipp=0.5)
    assert said.endswith("did you mean `quantization_config.clip`?")
    (said,) = errors(quant_method="ptqtp", clip=0.5)
    assert said == "`quantization_config.clip` is of `quant_method: quartet` (`--method quartet`)."
    (said,) = errors(quant_method="quartet", bits=3)  # it has nothing that means the same
    assert said == "`quantization_config.bits` is of `quant_method: d2quant` (`--method d2quant`)."
    (said,) = errors(quant_method="quartet", modules_to_not_convert=["*.up_proj"])
    assert "which is no regular expression" in said
    (said,) = errors(quant_method="quarte")
    assert said == "`quantization_config.quant_method` cannot be 'quarte'; did you mean 'quartet'?"


def test_from_the_command_line_to_the_card(example, make_model, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["quantize", str(make_model()), str(out), "--method", "quartet", "--clip", "0.7", "--stream"]
    assert main(arguments) == 0
    assert "solved a second time" not in capsys.readouterr().out
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "quartet" and stored["clip"] == 0.7
    card = (out / "README.md").read_text()
    for text in (
        "- **Quartet**: Rounding to four levels",
        "| `clip` | `0.7` |",
        'pip install "hf_rb',
        "hf-rb-example",
    ):
        assert text in card
    assert "()" not in card and "## Citation" not in card  # there is no paper
    assert load(out).hf_quantizer.quantization_config.clip == 0.7
    assert main(["export", str(out), str(tmp_path / "gptq")]) == 2
    assert "quantized with Quartet, whose codes GPTQ's format does not have" in capsys.readouterr().err


def test_what_else_follows_from_the_record(example):
    from hf_rb_example.quartet import QuartetConfig

    assert "hf-rb-example" in Loading(method="quartet").packages(adapter=False)
    assert len(Loading(method="ptqtp").packages(adapter=False)) == 1
    assert _title({"quant_method": "quartet"}) == "Quartet"
    assert "quartet, tiny:student: quantize, save, reload, dequantize" in dict(quantization_trials())
    assert methods("quantizer")["quartet"].method.memory_bits(QuartetConfig()) == 2.25


def test_titles():
    assert _title({"quant_method": "ptqtp", "planes": 1}) == "PTQTP, 1 plane"
    assert _title({"quant_method": "d2quant"}) == "D²Quant, 2 bits"
    assert _title({"quant_method": "d2quant", "backend": "rtn", "bits": 3}) == "D²Quant, 3 bits, without data"


HALF = """
from hf_rb.methods import QuantizerMethod
METHOD = QuantizerMethod(key="half", name="Half", summary="Rounds to one bit.")
"""


def test_a_broken_quantizer_is_named_and_the_others_work(tmp_path, monkeypatch, capsys):
    install(monkeypatch, tmp_path / "site", "half-done", HALF, quantizer={"half": "METHOD"})
    assert [*methods("quantizer")] == ["d2quant", "ptqtp"]
    said = "The quantizer 'half' of the package half-done (half_done:METHOD) cannot be used: TypeError: "
    assert broken("quantizer")["half"].startswith(said)
    (error,) = errors(quant_method="half")
    assert error.startswith(said) and "Update or uninstall that package." in error
    assert main(["quantize", "tiny:student", str(tmp_path / "out"), "--method", "half"]) == 2
    assert said in capsys.readouterr().err
    assert not errors(quant_method="ptqtp")
