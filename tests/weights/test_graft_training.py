"""Shadow-FT from a recipe and by the callback: trained with the Instruct model's tokenizer, grafted when training ends."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from helpers.random_models import save_qwen3
from helpers.raw_models import read
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb import SFTConfig, SFTTrainer
from hf_rb.cli import main
from hf_rb.scripts import sft
from hf_rb.weights import GraftCallback, graft


ARGUMENTS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Base without a chat template, Instruct with one; a file of conversations."""
    monkeypatch.chdir(tmp_path)
    base, instruct = save_qwen3(tmp_path / "base", seed=1), save_qwen3(tmp_path / "instruct", seed=2)
    (base / "chat_template.jinja").unlink()
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]}
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return base, instruct


def recipe(pair, **keys):
    keys = {
        "model_name_or_path": str(pair[0]),
        "graft_onto": str(pair[1]),
        "datasets": [{"path": "json", "data_files": "train.jsonl"}],
        "output_dir": "out",
    } | keys
    Path("recipe.yaml").write_text(
        yaml.safe_dump({key: value for key, value in (ARGUMENTS | keys).items() if value is not None})
    )
    return ["--config", "recipe.yaml"]


def test_a_recipe_tunes_all_weights_and_grafts(pair, capsys):
    sft.main(recipe(pair, graft_dtype="float32"))
    base, instruct, tuned, grafted = (read(Path(folder)) for folder in (*pair, "out", "out/grafted"))
    for name, tensor in grafted.items():
        expected = instruct[name] + (tuned[name] - base[name]) if "_proj" in name else instruct[name]
        assert torch.equal(tensor, expected), name
        assert not torch.equal(tuned[name], base[name])
    # Base has learned in the Instruct model's template.
    template = AutoTokenizer.from_pretrained(pair[1]).chat_template
    assert AutoTokenizer.from_pretrained("out").chat_template == template
    AutoModelForCausalLM.from_pretrained("out/grafted")
    assert "The grafted model is in out/grafted." in capsys.readouterr().out
    assert "Shadow-FT" in Path("out/grafted/README.md").read_text()
    with pytest.raises(FileExistsError):
        sft.main(recipe(pair))
    sft.main(recipe(pair, overwrite=True, graft_output_dir="elsewhere", graft_include="down_proj", max_steps=1))
    changed = {name for name, tensor in read(Path("elsewhere")).items() if not torch.equal(tensor, instruct[name])}
    assert changed and all("down_proj" in name for name in changed)


def test_a_recipe_tunes_an_adapter_and_grafts(pair):
    sft.main(recipe(pair, use_peft=True, lora_r=4, lora_target_modules=["q_proj", "up_proj"]))
    report = json.loads(Path("out/grafted/merge.json").read_text())
    merged = [row["name"] for row in report["tensors"] if row["kept"] is None]
    assert len(merged) == 4 and report["models"] == {"onto": "instruct"}
    graft("out", pair[1], "again")
    for name, tensor in read(Path("again")).items():
        assert torch.equal(tensor, read(Path("out/grafted"))[name])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"graft_onto": None, "graft_include": "all"}, "`graft_include` has no effect without `graft_onto`"),
        ({"eos_token": "<|im_end|>"}, "`eos_token` does not go with `graft_onto`"),
        ({"chat_template_path": "template"}, "`chat_template_path` does not go with `graft_onto`"),
        ({"use_peft": True, "use_dora": True}, "a DoRA is another delta on another model"),
        ({"use_peft": True, "lora_modules_to_save": ["lm_head"]}, "whole modules of Base would replace"),
        ({"graft_onto": "tiny:pupil"}, "`graft_onto`: 'tiny:pupil' does not exist"),
        ({"graft_dtype": "int8"}, "graft_dtype"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_bad_recipes_are_refused_before_a_model_is_loaded(pair, keys, message, monkeypatch, capsys):
    monkeypatch.setattr(sft, "SFTTrainer", lambda *_, **__: pytest.fail("a model would have been loaded"))
    argv = recipe(pair, **keys)
    assert main(["check", "recipe.yaml"]) == 2
    assert message in capsys.readouterr().err
    if "graft_dtype" not in keys:
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            sft.main(argv)


def test_models_of_two_families_are_refused(pair):
    tokenizer = json.loads((pair[1] / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (pair[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"different vocabularies: id \d+ is .*two models of one family"):
        sft.main(recipe(pair))
    narrow = save_qwen3(Path("narrow"), vocab_size=100)
    with pytest.raises(ValueError, match="narrow has 100 embeddings"):
        sft.main(recipe((narrow, pair[1])))


def trainer(pair, **kwargs):
    rows = Dataset.from_list([{"prompt": "1 + 1 = ", "completion": "2"}] * 4)
    return SFTTrainer(str(pair[0]), args=SFTConfig("out", **ARGUMENTS), train_dataset=rows, **kwargs)


def test_the_callback_finds_what_is_wrong_before_training(pair):
    with pytest.raises(FileNotFoundError, match="There is no folder nowhere"):
        GraftCallback(trainer(pair), onto="nowhere")
    dora = trainer(pair, peft_config=LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="The adapter in training cannot be grafted: DoRA scales"):
        GraftCallback(dora, onto=pair[1])
    Path("out/grafted").mkdir(parents=True)
    Path("out/grafted/notes.txt").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        GraftCallback(trainer(pair), onto=pair[1])


def test_the_callback_reports(pair):
    one = trainer(pair)
    callback = GraftCallback(one, onto=pair[1], destination="grafted", include="all")
    one.add_callback(callback)
    one.train()
    assert callback.report.norm("wanted") > 0 and callback.report.options["include"] == "all"
    assert not torch.equal(read(Path("grafted"))["model.norm.weight"], read(pair[1])["model.norm.weight"])
