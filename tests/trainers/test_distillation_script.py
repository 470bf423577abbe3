import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from hf_rb import tiny
from hf_rb.cli.check import check, read_recipe
from hf_rb.io.resources import resource_folder
from hf_rb.scripts import distillation


RECIPE = resource_folder("recipes") / "exopd" / "tiny-cpu.yaml"


pytestmark = pytest.mark.usefixtures("small_embedded")


def recipe(**keys):
    """The shipped recipe with other keys; `None` removes a key."""
    keys = read_recipe(RECIPE) | {"output_dir": "out"} | keys
    Path("recipe.yaml").write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return ["--config", "recipe.yaml"]


SHORT = [
    "--max_steps",
    "2",
    "--logging_steps",
    "1",
    "--per_device_train_batch_size",
    "4",
    "--max_completion_length",
    "6",
]


def test_the_shipped_recipe():
    distillation.main([*recipe(), *SHORT])
    AutoModelForCausalLM.from_pretrained("out")
    first = json.loads(Path("out/trainer_state.json").read_text())["log_history"][0]
    # Teacher, student and reference are one model here.
    assert first["loss"] == pytest.approx(0, abs=1e-5)
    assert first["gopd/reward"] == pytest.approx(0, abs=1e-5)
    card = Path("out/README.md").read_text()
    for expected in ("# out", "2602.12125", "`tiny:math`", "`tiny:student`", "`reward_scale` | `1.25`"):
        assert expected in card


def test_several_teachers_with_lora():
    rows = [
        row | {"domain": row["kind"] if index else "a"}
        for index, row in enumerate(tiny.load_dataset("math", "prompt_only"))
    ]
    domains = sorted({row["domain"] for row in rows})
    Path("train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    keys = {
        "dataset_name": None,
        "datasets": [{"path": "json", "data_files": "train.jsonl"}],
        "teacher_model_name_or_path": dict.fromkeys(domains, "tiny:teacher"),
        "gopd_teacher_column": "domain",
        "use_peft": True,
    }
    arguments = recipe(**keys)
    assert not check(Path("recipe.yaml"), read_recipe(Path("recipe.yaml")), "distillation").errors
    distillation.main([*arguments, *SHORT])
    assert Path("out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"model_name_or_path": None}, "There is no model"),
        ({"teacher_model_name_or_path": None}, "There is no teacher"),
        ({"dataset_config": "messages"}, "Distillation needs `prompt`: the student writes the completions"),
        (
            {"gopd_teacher_column": "domain", "teacher_model_name_or_path": {"a": "tiny:teacher"}},
            "needs `domain`: `gopd_teacher_column` names it",
        ),
        ({"objective": "hpd", "reward_scale": None}, "trains on the completions of the dataset"),
        ({"reward_scal": 1.5}, "Did you mean `reward_scale`?"),
        ({"kd_alpha": 0.5}, "recipe.yaml: `kd_alpha` acts on the completions of the dataset.*with `lmbda: 0.0`"),
        ({"teacher_cache": "folder"}, "recipe.yaml: `teacher_cache` acts on the completions of the dataset"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(monkeypatch, keys, message):
    monkeypatch.setattr(distillation, "DistillationTrainer", lambda *_, **__: pytest.fail("a model would be loaded"))
    with pytest.raises(ValueError, match=message):
        distillation.main(recipe(**keys))
