import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_rb.cli import main as cli
from hf_rb.io.resources import resource_folder
from hf_rb.scripts import gkd


pytestmark = pytest.mark.usefixtures("small_embedded")


SHORT = ["--max_steps", "2", "--eval_steps", "1", "--per_device_train_batch_size", "4"]


@pytest.mark.parametrize("method", ["akl", "hpd", "llm_neo", "loca"])
def test_the_shipped_recipes(method):
    gkd.main(["--config", str(resource_folder("recipes") / method / "tiny-cpu.yaml"), *SHORT])
    folder = Path(f"outputs/{method}-tiny")
    metrics = json.loads((folder / "eval_results.json").read_text())
    assert {"eval_loss", "eval_ce"} <= metrics.keys()
    AutoModelForCausalLM.from_pretrained(folder)
    assert method in (folder / "README.md").read_text()


def test_no_teacher_is_found_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(gkd, "GKDTrainer", lambda *_, **__: pytest.fail("a model would have been loaded"))
    arguments = ["--model_name_or_path", "tiny:student", "--dataset_name", "tiny:math", "--use_cpu", "--bf16", "false"]
    with pytest.raises(ValueError, match="There is no teacher. Set `teacher_model_name_or_path`"):
        gkd.main(arguments)
    with pytest.raises(ValueError, match="`objective: hpd` needs `lmbda: 0.0`"):
        gkd.main([*arguments, "--teacher_model_name_or_path", "tiny:teacher", "--objective", "hpd"])
    with pytest.raises(ValueError, match="Did you mean `kd_alpha`"):
        gkd.main([*arguments, "--kd_alfa", "0.5"])


def test_check_knows_the_verb(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: tiny:student\ndataset_name: tiny:math\nobjective: hpd\noutput_dir: x\n")
    assert cli(["check", str(recipe)]) == 2
    errors = capsys.readouterr().err
    assert "`objective: hpd` needs `lmbda: 0.0`" in errors and "no teacher" in errors
