"""`quantize_checkpoint`: the tensors of the in-memory path, little memory, and no harm from a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers.checkpoints import (
    SIZES,
    assert_same,
    experts,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_rb import PTQTPConfig
from hf_rb.cli import main
from hf_rb.quantizers import quantize, quantize_checkpoint
from hf_rb.quantizers.folders import stream as streaming
from hf_rb.quantizers.ptqtp import PTQTPQuantizer
from hf_rb.quantizers.ptqtp import solver_c as native


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).bfloat16().save_pretrained(folder, max_shard_size="150KB")
    return folder


def large_checkpoint(folder: Path) -> int:
    """Writes 77 million weights and returns their bytes."""
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=8, vocab_size=96)
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6, tie_word_embeddings=True)).bfloat16().save_pretrained(
        folder, max_shard_size="60MB"
    )
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_kills_and_memory(small, tmp_path):
    size = large_checkpoint(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    arguments = [sys.executable, Path(__file__).with_name("streaming_worker.py"), small, tmp_path / "source", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])

    quantize(small, tmp_path / "expected", PTQTPConfig())
    solved, runs = result["whole"]["solved"], result["runs"]
    assert len(solved) == 7 and len(runs) > 10
    assert sum(run["killed"] == -9 for run in runs) > 10
    for run in runs:
        assert run["code"] == 0, run
        if "exists" in run:  # the first had ended, but for the removal of its traces
            assert run["published"]
        else:
            assert run["layers"] == 7
        assert_same(out / run["name"], tmp_path / "expected")
        assert sorted(os.listdir(out / run["name"])) == sorted(os.listdir(out / "whole"))
        AutoModelForCausalLM.from_pretrained(out / run["name"])
    # What was done is not done again.
    assert min(len(run["solved"]) for run in runs) == 0
    assert any(0 < len(run["solved"]) < len(solved) for run in runs)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]

    # The largest tensor has 5.8 MB, 2.9 million weights; blocks of 16 MB are solved in float32, and up to 8 MB of weights go on at a time.
    # Without the compiled solver there are besides the trits of two planes and four float32 matrices: the weights, what stands for them,
    # the difference and its square.
    is_compiled = native.solver(torch.zeros(1, 1)) is not None
    assert size > 150e6
    assert result["growth"] < 60e6 + (0 if is_compiled else (2 + 4 * 4) * 2.9e6), result["growth"]


class Stop(Exception):
    pass


@pytest.fixture
def interrupted(small, tmp_path, monkeypatch, caplog):
    """An unfinished run into `out` with three of seven matrices done."""
    done, quantize_tensor = [], PTQTPQuantizer.quantize_tensor

    def stop(self, name, *args):
        if len(done) == 3:
            raise Stop
        done.append(name)
        return quantize_tensor(self, name, *args)

    monkeypatch.setattr(streaming, "PART", 1)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(PTQTPQuantizer, "quantize_tensor", stop)
        quantize_checkpoint(small, tmp_path / "out", PTQTPConfig())
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert "the same call goes on from there" in caplog.text
    return tmp_path / "out"


def solved(monkeypatch, *args, **kwargs):
    names, quantize_tensor = [], PTQTPQuantizer.quantize_tensor
    with monkeypatch.context() as patch:
        patch.setattr(
            PTQTPQuantizer,
            "quantize_tensor",
            lambda self, name, *rest: names.append(name) or quantize_tensor(self, name, *rest),
        )
        quantize_checkpoint(*args, **kwargs)
    return names


def test_goes_on_where_it_was(small, interrupted, monkeypatch):
    assert len(solved(monkeypatch, small, interrupted, PTQTPConfig())) == 4
    assert [path.name for path in interrupted.parent.iterdir()] == ["out"]


def test_progress(small, interrupted, monkeypatch):
    class Bar:
        def __init__(self, total, **kwargs):
            self.total, self.n = total, 0
            bars.append(self)

        def update(self, n):
            assert n >= 0
            self.n += n

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    bars = []
    monkeypatch.setattr(streaming, "tqdm", Bar)
    quantize_checkpoint(small, interrupted, PTQTPConfig())
    quantize_checkpoint(small, interrupted.parent / "again", PTQTPConfig())
    size = sum(tensor.nbytes for file in small.glob("*.safetensors") for tensor in load_file(file).values())
    assert [(bar.n, bar.total) for bar in bars] == [(size, size)] * 2


def test_starts_over_on_request(small, interrupted, monkeypatch):
    assert len(solved(monkeypatch, small, interrupted, PTQTPConfig(group_size=64), resume=False)) == 7


def test_refuses_another_configuration(small, interrupted, capsys):
    with pytest.raises(ValueError, match=r"group_size was 128 and is 64.*`--no-resume`"):
        quantize_checkpoint(small, interrupted, PTQTPConfig(group_size=64))
    with pytest.raises(ValueError, match="dtype was 'auto' and is 'float32'"):
        quantize_checkpoint(small, interrupted, PTQTPConfig(), dtype="float32")
    assert main(["quantize", str(small), str(interrupted), "--stream", "--scale-mode", "tied"]) == 2
    assert "scale_mode was 'free' and is 'tied'" in capsys.readouterr().err
    assert main(["quantize", str(small), str(interrupted), "--stream", "--no-resume", "--scale-mode", "tied"]) == 0


def test_refuses_changed_files(small, interrupted):
    file = sorted(small.glob("*.safetensors"))[0]
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    try:
        os.utime(file, ns=(times[0], times[1] + 1_000_000))
        with pytest.raises(ValueError, match=f"{file.name} changed"):
            quantize_checkpoint(small, interrupted, PTQTPConfig())
    finally:
        os.utime(file, ns=times)


def test_a_second_process_on_the_same_folder_is_refused(small, interrupted):
    with (
        FileLock(interrupted.parent / ".out.partial" / "lock"),
        pytest.raises(ValueError, match="Another process is at work"),
    ):
        quantize_checkpoint(small, interrupted, PTQTPConfig())


def test_refuses_what_exists_and_leaves_nothing(small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(FileExistsError, match="--overwrite"):
        quantize_checkpoint(small, tmp_path / "out", PTQTPConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    quantize_checkpoint(small, tmp_path / "out", PTQTPConfig(), overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def break_shape(stored):
    stored["model.norm.weight"] = torch.ones(5)


def break_rows(stored):
    stored["model.layers.0.mlp.up_proj.weight"] = torch.ones(5, 192)


def break_value(stored):
    stored["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda stored: stored.pop("model.norm.weight"),
            "The files have no model.norm.weight, which Qwen3ForCausalLM",
        ),
        (break_shape, "model.norm.weight has shape"),
        (break_rows, "model.layers.0.mlp.up_proj.weight has shape"),
        (break_value, r"model.layers.0.mlp.up_proj.weight: .*NaN"),
    ],
)
def test_refuses_files_that_do_not_fit(tmp_path, damage, message):
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    damage(stored)
    save_file(stored, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", PTQTPConfig())
    assert not (tmp_path / "out").exists()


def test_refuses_a_missing_expert(tmp_path):
    experts(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    del stored["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(stored, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="of the .* weights of model.layers.0.mlp.experts.gate_up_proj"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", PTQTPConfig())


def test_refuses_a_truncated_file(tmp_path):
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is truncated"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", PTQTPConfig())


def test_verb_stream_reports_its_layers_as_json(small, tmp_path, capsys):
    assert main(["quantize", str(small), str(tmp_path / "out"), "--stream", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == 7 and report["file_bytes"] > 0
