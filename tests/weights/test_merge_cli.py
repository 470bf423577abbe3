"""`hf-rb merge`: what reaches the functions, what is refused, what is printed."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from helpers.random_models import save_qwen3
from helpers.raw_models import noise, read, write

from hf_rb.cli import main
from hf_rb.hub import read_results


@pytest.fixture
def three(tmp_path):
    names = [f"model.layers.0.{kind}_proj.weight" for kind in ("q", "up")] + ["model.embed_tokens.weight"]
    for seed, name in enumerate(["base", "tuned", "instruct"]):
        write(tmp_path / name, {n: noise(12, 8, seed=10 * seed + i) for i, n in enumerate(names)})
    return [str(tmp_path / name) for name in ("base", "tuned", "instruct")]


@pytest.fixture
def called(monkeypatch):
    """What `merge_models` is called with."""
    from hf_rb import weights

    def merge_models(method, models, destination, **options):
        seen.update(models, method=method, destination=destination, **options)
        return weights.MergeReport(method, {}, "")

    seen = {}
    monkeypatch.setattr(weights, "merge_models", merge_models)
    monkeypatch.setattr("hf_rb.cli.merge.find_model", lambda name, adapter: None)  # the models are letters
    return seen


def test_verb_linear_merges_by_rules_and_writes_a_card(three, tmp_path, capsys):
    base, _, instruct = three
    arguments = ["--start", instruct, "--end", base, "--rule", "embed=0", "--rule", "layers:0=1"]
    assert main(["merge", "--method", "linear", *arguments, str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["options"]["rules"] == {"embed": 0.0, "layers:0": 1.0}
    merged = read(tmp_path / "out")
    for name, tensor in merged.items():
        assert torch.equal(tensor, read(tmp_path / ("instruct" if "embed" in name else "base"))[name])
    card = (tmp_path / "out/README.md").read_text()
    assert "Made from `instruct` and `base` by" in card and "| `end` | `base` |" in card


def test_graft(three, tmp_path, capsys):
    base, tuned, instruct = three
    models = ["--base", base, "--tuned", tuned, "--onto", instruct]
    assert main(["merge", "--method", "graft", *models, str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for expected in (
        "q_proj",
        "not included (kept)",
        "delta lost",
        "sigma in the layers",
        "Everything else is from instruct",
    ):
        assert expected in out
    assert str(tmp_path) not in (tmp_path / "out/merge.json").read_text()
    assert main(["merge", "--method", "graft", *models, str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_timber_sweep(three, tmp_path, capsys):
    base, _, instruct = three
    models = ["--base", base, "--model", instruct]
    assert main(["merge", "--method", "timber", *models, "--lambda", "0,0.5", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "erank D" in out and "energy kept" in out and "erank Base" in out
    # Norms over norms, effective ranks and k with one digit, the share of the energy with four.
    (row,) = re.findall(r"^all merged .*$", out, re.MULTILINE)
    assert re.search(r" \d\.\d\de[+-]\d\d( +\d\.\d){5} +[01]\.\d{4}$", row)
    assert "erank D: the same of D, their difference" in out and "k: directions of D" in out  # the table explained
    assert f"Saved in {tmp_path}/out/lambda-0 (lambda 0), {tmp_path}/out/lambda-0.5 (lambda 0.5): " in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lambda-0", "lambda-0.5", "merge.json"]


def test_adapters(tmp_path, capsys):
    from test_weight_adapters import save_adapter

    base = save_qwen3(tmp_path / "base")
    adapter = str(save_adapter(base, tmp_path / "adapter"))
    assert main(["merge", "--method", "graft", "--tuned", adapter, "--onto", str(base), str(tmp_path / "a")]) == 0
    assert "delta" in capsys.readouterr().out
    kept = ["--tuned", adapter, "--onto", str(base), "--keep-adapter"]
    assert main(["merge", "--method", "graft", *kept, str(tmp_path / "b")]) == 0
    assert "the adapter, as it is" in capsys.readouterr().out
    assert main(["merge", "--method", "linear", "--start", adapter, "--end", adapter, str(tmp_path / "c")]) == 0
    assert main(["merge", "--method", "timber", "--model", adapter, str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    assert "not in the paper" in out and f"Saved in {tmp_path}/d (lambda 0.2): " in out


@pytest.mark.parametrize("name", ["overwrite", "resume", "progress", "extrapolate"])
@pytest.mark.parametrize("value", [True, False])
def test_booleans_of_linear(called, name, value):
    flag = f"--{name}" if value else f"--no-{name}"
    assert main(["merge", "--method", "linear", "--start", "a", "--end", "b", "out", flag]) == 0
    assert called[name] is value and called["method"] == "linear"
    assert set(called) == {"method", "destination", "start", "end", name}


@pytest.mark.parametrize(("method", "name"), [("graft", "keep_adapter"), ("timber", "spectra")])
@pytest.mark.parametrize("value", [True, False])
def test_booleans_of_others(called, method, name, value):
    models = {"graft": ["--tuned", "a", "--onto", "b"], "timber": ["--base", "a", "--model", "b"]}[method]
    assert (
        main(["merge", "--method", method, *models, "out", f"--{'' if value else 'no-'}{name.replace('_', '-')}"]) == 0
    )
    assert called[name] is value


@pytest.mark.parametrize("text", ["false", "False", "0", "no"])
def test_a_boolean_takes_no_text(called, text, capsys):
    """Other tools read any text as true."""
    arguments = ["merge", "--method", "linear", "--start", "a", "--end", "b", "out", "--overwrite", text]
    assert main(arguments) == 2 and not called
    assert f"unknown argument '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "linear", "--start", "a", "out"], "--method linear needs --end MODEL."),
        (["--method", "graft", "out"], "--method graft needs --tuned MODEL and --onto MODEL."),
        (
            ["--method", "graft", "--tuned", "a", "--onto", "b", "--lambda", "0.5", "out"],
            "--lambda does nothing with --method graft",
        ),
        (["--method", "timber", "--model", "a", "--onto", "b", "out"], "--onto does nothing with --method timber"),
        (["--method", "linear", "--start", "a", "--end", "b", "out", "--no-spectra"], "--spectra does nothing"),
        (
            ["--method", "linear", "--start", "a", "--end", "b", "--lambda", "half", "out"],
            "expected a number, or several as 0.2,0.5,0.8",
        ),
        (["--method", "linear", "--start", "a", "--end", "b", "--rule", "attn", "out"], "expected PATTERN=LAMBDA"),
        (["--method", "slurp", "out"], "invalid choice: 'slurp'"),
        (["--method", "linear", "--start", "nowhere", "--end", "b", "out"], "There is no folder nowhere"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    assert main(["merge", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_lambda_outside(three, tmp_path, capsys):
    arguments = [
        "merge",
        "--method",
        "linear",
        "--start",
        three[0],
        "--end",
        three[1],
        "--lambda",
        "1.5",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    assert "--extrapolate" in capsys.readouterr().err
    assert main([*arguments, "--extrapolate"]) == 0


def test_a_sweep_is_evaluated_and_drawn(tmp_path, capsys):
    folders = [str(save_qwen3(tmp_path / name, seed=seed)) for seed, name in enumerate(["start", "end"])]
    sweep = str(tmp_path / "sweep")
    models = ["--start", folders[0], "--end", folders[1]]
    assert main(["merge", "--method", "linear", *models, "--lambda", "0,0.5,1", sweep]) == 0
    (tmp_path / "text.txt").write_text("There are 7 red, 9 blue and 12 green cups. " * 10)
    measure = ["--perplexity", str(tmp_path / "text.txt"), "--window", "64"]
    drawn, out = tmp_path / "curve.svg", tmp_path / "out.json"
    capsys.readouterr()
    assert main(["eval", sweep, *measure, "--plot", str(drawn), "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["lambda", "0", "0.5", "1"] and "perplexity, window 64" in table
    results = json.loads(out.read_text())["sweep"]
    assert [result["lambda"] for result in results] == [0, 0.5, 1]
    for result, folder in zip((results[0], results[2]), folders, strict=True):
        assert main(["eval", folder, *measure, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["perplexity"] == result["perplexity"]
    svg = ElementTree.parse(drawn).getroot()
    assert len(svg.findall(".//{*}circle")) == 3 and "perplexity" in drawn.read_text()
    with pytest.raises(ValueError, match="is a sweep of several models"):
        read_results(out)
    again = tmp_path / "again.svg"
    assert main(["eval", folders[0], *measure, "--plot", str(again)]) == 2
    assert "is no sweep" in capsys.readouterr().err
    assert main(["eval", sweep, "--plot", str(again)]) == 2
    assert "is asked for none of them" in capsys.readouterr().err


def test_help_and_bad_input_need_no_torch():
    code = """
import sys
from hf_rb.cli import main
assert main(["merge", "--help"]) == 0
for arguments in (["--method", "ties"], ["--method", "graft", "--density", "1"], ["--method", "slerp", "--start", "nowhere", "--end", "b"]):
    assert main(["merge", *arguments, "out"]) == 2
print({"torch", "transformers"} & {*sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
