import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb import tiny
from hf_rb.hub import plan_upload
from hf_rb.io.resources import resource_folder
from hf_rb.report import make_report, read_source
from hf_rb.scripts import _common, sft


RECIPE = str(resource_folder("recipes") / "profit" / "tiny-cpu.yaml")


pytestmark = pytest.mark.usefixtures("small_embedded")


@pytest.fixture
def no_model(monkeypatch):
    def fail(*_, **__):
        pytest.fail("a model would have been loaded")

    monkeypatch.setattr(sft, "SFTTrainer", fail)


def recipe(**keys):
    """A small recipe as a file; `None` removes a key."""
    keys = {
        "model_name_or_path": "tiny:student",
        "dataset_name": "tiny:math",
        "output_dir": "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    } | keys
    Path("recipe.yaml").write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return ["--config", "recipe.yaml"]


def test_the_shipped_recipe(caplog):
    short = [
        "--max_steps",
        "2",
        "--eval_steps",
        "1",
        "--per_device_train_batch_size",
        "4",
        "--profit_threshold",
        "0.001",
    ]
    sft.main(["--config", RECIPE, "--output_dir", "out", *short])
    AutoModelForCausalLM.from_pretrained("out")
    state = json.loads(Path("out/trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]  # none is repeated at the end
    assert json.loads(Path("out/eval_results.json").read_text())["eval_loss"] == evaluations[-1]["eval_loss"]
    assert "train_loss" in json.loads(Path("out/train_results.json").read_text())
    card = Path("out/README.md").read_text()
    for expected in ("# out", "ProFit", "`tiny:math`", "`tiny:student`", "`profit_threshold` | `0.001`"):
        assert expected in card
    samples = json.loads(Path("out/token_samples.json").read_text())
    assert [one["step"] for one in samples["snapshots"]] == [0, 2]
    assert "ProFit: what was masked" in make_report([read_source("out")]).panels
    assert "token_samples.json" in plan_upload("out").left_out
    sft.main(["--config", RECIPE, "--output_dir", "other", "--token_samples", "false", *short])
    assert not Path("other/token_samples.json").exists()


def test_local_files_lora_and_resuming(capsys):
    rows = tiny.load_dataset("math", config="prompt_completion", size=8)
    rows.to_json("train.jsonl")
    keys = {
        "dataset_name": None,
        "datasets": [{"path": "json", "data_files": "train.jsonl"}],
        "use_peft": True,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    sft.main(recipe(**keys))
    assert Path("out/adapter_model.safetensors").exists()
    assert "`train.jsonl`" in Path("out/README.md").read_text()

    for holds in ("adapter_config.json", "checkpoint-"):  # a finished run, then an interrupted one
        with pytest.raises(FileExistsError, match=f"already holds a model or checkpoints of one .{holds}") as error:
            sft.main(recipe(**keys))
        assert "`--resume_from_checkpoint true`" in str(error.value) and "`--overwrite`" in str(error.value)
        Path("out", "adapter_config.json").unlink(missing_ok=True)

    sft.main([*recipe(**keys, max_steps=3), "--resume_from_checkpoint", "true"])
    state = json.loads(Path("out/trainer_state.json").read_text())
    assert state["global_step"] == 3 and Path("out/checkpoint-3").exists()

    sft.main([*recipe(**keys | {"use_peft": False, "save_strategy": "no"}), "--overwrite"])
    left = {path.name for path in Path("out").iterdir()}
    assert "model.safetensors" in left and not {name for name in left if "adapter" in name or "checkpoint" in name}


def test_nothing_of_an_earlier_run_is_lost_by_mistake(no_model):
    Path("out/checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match="`--overwrite` deletes the checkpoints that `--resume_from_checkpoint`"):
        sft.main([*recipe(), "--overwrite", "--resume_from_checkpoint", "true"])
    with pytest.raises(FileExistsError, match="already holds"):
        sft.main([*recipe(), "--resume_from_checkpoint", "false"])
    assert Path("out/checkpoint-1").exists()


def test_tool_calls(no_model):
    """The transcripts hold a `prompt` too, which TRL would take for half of a prompt and completion."""
    *_, (train, test) = sft.prepare(recipe(dataset_config="tools", eval_strategy="epoch"))
    assert {"messages", "tools"} <= set(train.column_names) and "prompt" not in train.column_names + test.column_names


REFUSALS = {
    "`profit_treshold` in recipe.yaml is not an option. Did you mean `profit_threshold`?": {"profit_treshold": 0.1},
    "`zzz` in recipe.yaml is not an option. Remove it.": {"zzz": 1},
    "`profit_threshold` must be in [0, 1]": {"profit_threshold": 3},
    "There is no model. Set `model_name_or_path`": {"model_name_or_path": None},
    "There is no dataset. Set `dataset_name`, or `datasets`": {"dataset_name": None},
    "'tiny:maths' is not a dataset": {"dataset_name": "tiny:maths"},
    "Write `datasets: [{path: json, data_files: rows.jsonl}]`": {"dataset_name": "rows.jsonl"},
    "`dataset_name` names 'nowhere.jsonl', which does not exist": {"dataset_name": "nowhere.jsonl"},
    "`datasets` names the file nowhere.jsonl, which does not exist in": {
        "dataset_name": None, "datasets": [{"path": "json", "data_files": "nowhere.jsonl"}],
    },
    "only 'train'. Set `dataset_train_split`": {
        "dataset_name": None, "datasets": [{"path": "json", "data_files": "rows.jsonl"}], "dataset_train_split": "training",
    },
    "The dataset has the columns question. SFT needs `messages`, `prompt` with `completion`, or `text`": {
        "dataset_name": None, "datasets": [{"path": "json", "data_files": "rows.jsonl"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("message, keys", REFUSALS.items(), ids=REFUSALS)
def test_refusals_come_before_the_model(no_model, message, keys):
    Path("rows.jsonl").write_text('{"question": "2 + 2?"}\n')
    with pytest.raises((ValueError, OSError)) as error:
        sft.main(recipe(**keys))
    assert message in str(error.value)
    assert not Path("out").exists()


def test_a_model_that_is_nowhere():
    with pytest.raises(FileNotFoundError, match="There is no folder nobody/nothing, and the Hub has no such model"):
        sft.main(recipe(model_name_or_path="nobody/nothing"))


def test_arguments_are_strict_too(no_model):
    with pytest.raises(
        ValueError, match="`learning_rat` in the command line is not an option. Did you mean `learning_rate`?"
    ):
        sft.main([*recipe(), "--learning_rat", "1e-3"])
    with pytest.raises(OSError, match="nowhere.yaml"):
        sft.main(["--config=nowhere.yaml"])


def test_an_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"), _common.readable_errors("hf_rb.scripts.sft"):
        sft.prepare(recipe(profit_treshold=1))
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "hf_rb.scripts.sft: error: `profit_treshold` in recipe.yaml is not an option. Did you mean `profit_threshold`?"
    ]


def test_a_model_that_cannot_pack_is_one_line_too(capsys):
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny.resolve("tiny:student"))
    tokenizer.save_pretrained("opt")
    sizes = dict(hidden_size=32, ffn_dim=32, word_embed_proj_dim=32, num_hidden_layers=1, num_attention_heads=2)
    OPTForCausalLM(OPTConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained("opt")
    packed = recipe(model_name_or_path="opt", packing=True)
    with pytest.raises(SystemExit, match="2"):
        _common.run(sft.prepare, sft.build, packed, "hf_rb.scripts.sft")
    lines, start = (
        capsys.readouterr().err.splitlines(),
        "hf_rb.scripts.sft: error: OPTForCausalLM does not keep the sequences",
    )
    assert sum(line.startswith(start) for line in lines) == 1 and not any("Traceback" in line for line in lines)


def test_a_recipe_quantizes_what_it_loads(monkeypatch):
    trainers = []

    class Recorded(sft.SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(sft, "SFTTrainer", Recorded)
    quantization = {"quant_method": "ptqtp", "group_size": 64}
    sft.main(recipe(model_init_kwargs={"quantization_config": quantization}, use_peft=True, profit_threshold=0.0))
    config = trainers[0].model.config.quantization_config
    assert (config.quant_method, config.group_size) == ("ptqtp", 64)
    assert Path("out/adapter_model.safetensors").exists()
