import json
import logging
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import trl
from huggingface_hub import HfApi
from peft import LoraConfig

from hf_rb import SFTConfig, SFTTrainer, tiny
from hf_rb.io import files as _files
from hf_rb.trainers.common import checkpoints


@pytest.fixture(scope="module")
def data():
    return tiny.load_dataset("math", config="messages", size=12)


@pytest.fixture
def make(student, config, data):
    """Makes a trainer that saves after each of four steps; dropout-free, but with Adam's state and a shuffled order to resume."""

    def make(trainer_class=SFTTrainer, config_class=SFTConfig, peft_config=None, **changes):
        args = config_class(**config | {"max_steps": 4, "save_strategy": "steps", "save_steps": 1} | changes)
        return trainer_class(str(student), args, train_dataset=data, peft_config=peft_config)

    return make


def checkpoint(trainer, step):
    return Path(trainer.args.output_dir, f"checkpoint-{step}")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_resume_names_and_skips_an_incomplete_checkpoint(make, caplog):
    trainer = make(profit_threshold=1e-3)
    trainer.train()
    expected = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    for step in range(1, 5):
        assert _files.verify_manifest(checkpoint(trainer, step)) == []
    files = json.loads((checkpoint(trainer, 4) / _files.MANIFEST).read_text())["files"]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(files)

    truncate(checkpoint(trainer, 4) / "optimizer.pt")
    (checkpoint(trainer, 3) / _files.MANIFEST).unlink()
    resumed = make(profit_threshold=1e-3)
    with caplog.at_level(logging.WARNING):
        result = resumed.train(resume_from_checkpoint=True)
    assert f"{checkpoint(trainer, 4)}, which is incomplete: optimizer.pt has" in caplog.text
    assert f"{checkpoint(trainer, 3)}, which is incomplete: {_files.MANIFEST} is missing" in caplog.text
    assert str(checkpoint(trainer, 2)) not in caplog.text
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert result.global_step == 4
    assert _files.verify_manifest(checkpoint(trainer, 4)) == []  # written again
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, expected[name])  # as if never interrupted


def test_nothing_complete_to_resume_from(make):
    trainer = make(max_steps=2)
    with pytest.raises(ValueError, match="There is no checkpoint in .*output to resume from"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    truncate(checkpoint(trainer, 1) / "model.safetensors")
    truncate(checkpoint(trainer, 2) / "scheduler.pt")
    with pytest.raises(ValueError, match="None of the 2 checkpoints in .* is complete"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint-1 is incomplete: model.safetensors has"):
        trainer.train(resume_from_checkpoint=str(checkpoint(trainer, 1)))


def test_a_checkpoint_of_trl_is_taken_by_path(make):
    make(trl.SFTTrainer, trl.SFTConfig, max_steps=2).train()
    trainer = make(max_steps=3)
    with pytest.raises(
        ValueError, match="To resume from a checkpoint that another trainer has written, give its path"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.train(resume_from_checkpoint=str(checkpoint(trainer, 2))).global_step == 3


def test_an_interrupted_save_is_recognised(make, monkeypatch):
    trainer = make(save_steps=2, save_total_limit=1)
    save = trainer._save_optimizer_and_scheduler

    def interrupted(folder):
        if folder.endswith("-4"):
            raise KeyboardInterrupt
        save(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.args.save_total_limit == 1
    assert (checkpoint(trainer, 4) / "model.safetensors").exists()  # it would load, and resume without Adam's state
    with pytest.raises(ValueError, match="checkpoint-4 is incomplete: .* says that the files are not all written"):
        make().train(resume_from_checkpoint=str(checkpoint(trainer, 4)))
    assert checkpoints.complete_checkpoint(trainer.args.output_dir, True) == str(checkpoint(trainer, 2))


def test_old_checkpoints_outlive_the_manifest_of_the_new_one(make, monkeypatch):
    trainer, seen = make(save_total_limit=1), []

    def write_manifest(folder):
        seen.append(sorted(path.name for path in folder.parent.glob("checkpoint-*")))
        return _files.write_manifest(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", write_manifest)
    trainer.train()
    assert seen == [["checkpoint-1"]] + [[f"checkpoint-{step - 1}", f"checkpoint-{step}"] for step in (2, 3, 4)]
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_what_is_pushed_while_training(make, monkeypatch, strategy):
    pushed = []

    def done():
        future = Future()
        future.set_result(None)
        return future

    def upload(self, folder_path, path_in_repo, **kwargs):
        assert not _files.verify_manifest(folder_path)
        pushed.append((Path(folder_path).name, path_in_repo, None))
        return done()

    def commit(self, repo_id, operations, **kwargs):
        pushed.append((repo_id, None, [operation.path_in_repo for operation in operations]))
        return done()

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    trainer = make(max_steps=2, hub_strategy=strategy)
    trainer.args.push_to_hub, trainer.hub_model_id = True, "me/model"  # after the start, which would make a repository
    output = Path(trainer.args.output_dir)
    output.mkdir(exist_ok=True)
    (output / "token_samples.json").write_text("{}")
    trainer.train()
    models = [patterns for _, path, patterns in pushed if path is None]
    assert len(models) == 2 and all("model.safetensors" in names for names in models)
    assert not {"token_samples.json", "training_args.bin", "trainer_state.json"} & set(models[1])
    checkpoints = [(folder, path) for folder, path, _ in pushed if path]
    assert checkpoints == [(f"checkpoint-{step}", "last-checkpoint") for step in (1, 2)] * (strategy == "checkpoint")
    assert (output / "model.safetensors").read_bytes() == (output / "checkpoint-2/model.safetensors").read_bytes()


def test_model_only_and_adapter_checkpoints(make):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = make(max_steps=2, save_steps=2, save_only_model=True, peft_config=lora)
    trainer.train()
    files = json.loads((checkpoint(trainer, 2) / _files.MANIFEST).read_text())["files"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files) and "optimizer.pt" not in files
    shutil.rmtree(trainer.args.output_dir)
    trainer = make(max_steps=2, peft_config=lora)
    trainer.train()
    truncate(checkpoint(trainer, 2) / "adapter_model.safetensors")
    assert checkpoints.complete_checkpoint(trainer.args.output_dir, True) == str(checkpoint(trainer, 1))
    assert make(max_steps=2, peft_config=lora).train(resume_from_checkpoint=True).global_step == 2


def test_identity_follows_the_flags(make):
    off, on = make(), make(profit_threshold=0.1)
    assert (off._tag_names, off._name, off._paper) == (["hf_rb", "trl", "sft"], "SFT", {})
    assert (on._tag_names, on._name, on._paper["id"]) == (
        ["hf_rb", "trl", "sft", "profit"],
        "SFT + ProFit",
        "2601.09195",
    )


def test_card_and_push(make, data, monkeypatch):
    trainer = make(max_steps=1, profit_threshold=1e-3)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    trainer.evaluate()
    uploaded = {}
    monkeypatch.setattr(trainer, "init_hf_repo", lambda **_: setattr(trainer, "hub_model_id", "me/student-profit"))

    def commit(self, repo_id, operations, **kwargs):
        uploaded.update({one.path_in_repo: one.path_or_fileobj for one in operations}, repo_id=repo_id)

    monkeypatch.setattr(HfApi, "create_commit", commit)
    trainer.push_to_hub(dataset_name="tiny:math", base_model="tiny:student")

    assert uploaded["repo_id"] == "me/student-profit"
    assert uploaded["model.safetensors"] == str(Path(trainer.args.output_dir, "model.safetensors"))
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert uploaded["README.md"] == card.encode()
    for expected in (
        "ProFit",
        "2601.09195",
        "`tiny:math`",
        "`profit_threshold` | `0.001`",
        'from_pretrained("me/student-profit")',
    ):
        assert expected in card
    assert f"| {trainer.state.log_history[-1]['eval_loss']:.4g} |" in card
    assert card.count("- trl\n") == card.count("- profit\n") == 1
    assert str(trainer.args.output_dir) not in card


def test_metrics_are_ratios_of_sums(make):
    trainer = make()
    trainer.model.eval()
    for numerator, denominator in ((1, 1), (0, 3)):
        trainer._add_metric("ratio", torch.tensor(numerator), torch.tensor(denominator))
        trainer._add_metric("empty", torch.tensor(0), torch.tensor(0))
    logs = {}
    trainer.log(logs)
    assert logs["eval_ratio"] == 0.25 and "eval_empty" not in logs
    logs = {}
    trainer.log(logs)
    assert "eval_ratio" not in logs
