import subprocess

import pytest
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hf_rb.cli import main
from hf_rb.utils import compat


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "recipe.yaml"
    values = {"model_name_or_path": "tiny:student", "dataset_name": "tiny:math", "output_dir": "out", "use_cpu": True}
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture
def launched(monkeypatch) -> list:
    """What would have been launched, as accelerate has parsed it."""
    calls = []
    monkeypatch.setattr(compat, "launch_command", calls.append, raising=False)
    return calls


def test_the_recipe_and_the_overrides_reach_the_script(recipe, launched, monkeypatch):
    monkeypatch.setattr(compat, "default_config_file", "none", raising=False)
    assert main(["sft", recipe, "--learning_rate", "1e-3", "--packing"]) == 0
    (call,) = launched
    assert call.module and call.training_script == "hf_rb.scripts.sft"
    assert call.training_script_args == ["--config", recipe, "--learning_rate", "1e-3", "--packing"]
    assert call.config_file is None
    assert (call.num_processes, call.num_machines, call.mixed_precision) == (
        1,
        1,
        "no",
    )  # so that accelerate need not warn


def test_accelerate_config_by_name_by_file_and_missing(recipe, launched, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("num_processes: 1\n")
    for name in ("cpu2", str(file)):
        assert main(["sft", recipe, "--accelerate_config", name, "--num_processes", "2"]) == 0
    assert launched[0].config_file.endswith("recipes/accelerate_configs/cpu2.yaml")
    assert launched[1].config_file == str(file) and launched[1].num_processes == 2
    assert main(["sft", recipe, "--accelerate_config", "cpu3"]) == 2
    assert "No accelerate config 'cpu3': give a file, or one of cpu2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--learning_ratee", "1"], "unknown key `learning_ratee`; did you mean `learning_rate`?"),
        (["--profit_threshold", "2"], "`profit_threshold` must be in [0, 1]; got 2.0"),
        (["--max_steps", "many"], "`max_steps` must be int; got 'many'"),
    ],
)
def test_a_mistake_is_found_before_anything_is_launched(recipe, launched, override, message, capsys):
    assert main(["sft", recipe, *override]) == 2
    assert message in capsys.readouterr().err
    assert not launched


def test_the_recipe_comes_first(launched, capsys):
    assert main(["sft", "--model_name_or_path", "tiny:student"]) == 2
    assert "the recipe comes first: `hf-rb sft RECIPE --model_name_or_path ...`" in capsys.readouterr().err
    assert not launched


def one_process(code: int) -> Exception:
    return subprocess.CalledProcessError(code, "python")


def several_processes(code: int) -> Exception:
    return ChildFailedError("script", {1: ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="")})


@pytest.mark.parametrize("error", [one_process, several_processes])
@pytest.mark.parametrize(("script", "code"), [(2, 2), (1, 1), (-9, 1)])
def test_the_exit_code_is_the_scripts(recipe, monkeypatch, error, script, code):
    def fail(args):
        raise error(script)

    monkeypatch.setattr(compat, "launch_command", fail, raising=False)
    assert main(["sft", recipe]) == code


@pytest.mark.slow
@pytest.mark.parametrize(
    "accelerate_config", [[], ["--accelerate_config", "cpu2"]], ids=["one process", "two processes"]
)
def test_a_recipe_trains(accelerate_config, tmp_path):
    overrides = ["--max_steps", "2", "--eval_strategy", "no", "--output_dir", str(tmp_path / "out")]
    assert main(["sft", "profit/tiny-cpu", *accelerate_config, *overrides]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    # The folder now holds a model: the script refuses it, and its exit code comes through.
    assert main(["sft", "profit/tiny-cpu", *accelerate_config, *overrides]) == 2
