"""Configs of TRL, and those that users derive from them, in place of ours."""

from dataclasses import dataclass, fields
from itertools import permutations

import pytest
import torch
import trl
from transformers import TrainingArguments

import hf_rb
from hf_rb import tiny
from hf_rb.trainers.common.configs import own_config
from hf_rb.trainers.gkd.base_config import GKDArguments
from hf_rb.utils import compat


@dataclass
class MySFT(trl.SFTConfig):
    my_flag: int = 3

    def __post_init__(self):
        super().__post_init__()
        self.warmup_steps += 1  # once


@dataclass
class MyGKD(compat.GKDConfig):
    my_flag: int = 3


@dataclass
class MyDistillation(trl.DistillationConfig):
    my_flag: int = 3


@dataclass
class MyGRPO(trl.GRPOConfig):
    my_flag: int = 3


def no_reward(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("mine", "name", "keywords"),
    [
        (MySFT, "SFT", {}),
        (MyGKD, "GKD", {"teacher_model": "tiny:teacher"}),
        (MyDistillation, "Distillation", {"teacher_model": "tiny:teacher"}),
        (MyGRPO, "GRPO", {"reward_funcs": no_reward}),
    ],
)
def test_a_config_derived_from_trl_is_accepted(student, config, tmp_path, mine, name, keywords):
    ours, trainer_class = getattr(hf_rb, f"{name}Config"), getattr(hf_rb, f"{name}Trainer")
    generations = {"num_generations": 2} if name == "GRPO" else {}
    given = mine(**config, **generations, my_flag=5, learning_rate=3e-4)
    before = dict(vars(given))
    layout = "messages" if name in ("SFT", "GKD") else "prompt_only"
    data = tiny.load_dataset("math", config=layout, size=4)
    trainer = trainer_class(str(student), args=given, train_dataset=data, **keywords)
    args = trainer.args
    assert isinstance(args, mine) and isinstance(args, ours) and type(args).__name__ == mine.__name__
    assert (args.my_flag, args.learning_rate) == (5, 3e-4) and args.to_dict()["my_flag"] == 5
    for field in fields(given):  # values that the user's config has derived stay as they are
        assert getattr(args, field.name) == before[field.name], field.name
    # As trainers save it.
    torch.save(args, tmp_path / "training_args.bin")
    again = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(again) is type(args) and again.to_dict() == args.to_dict()


def test_a_config_of_trl_is_ours_with_the_flags_off(config):
    args = own_config(hf_rb.GRPOConfig, trl.GRPOConfig(**config, num_generations=2), "model", "GRPO")
    assert type(args) is hf_rb.GRPOConfig and args == hf_rb.GRPOConfig(**config, num_generations=2)
    plain = own_config(hf_rb.SFTConfig, TrainingArguments(**config), "model", "SFT")
    assert type(plain) is hf_rb.SFTConfig and plain.profit_threshold is None


def test_a_value_of_trl_that_ours_refuses_is_refused(config):
    given = compat.GKDConfig(**config, lmbda=1.0, seq_kd=True)
    with pytest.raises(ValueError, match="`seq_kd: true` has no effect with `lmbda: 1.0`"):
        own_config(hf_rb.GKDConfig, given, "model", "GKD")


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (hf_rb.SFTConfig, "Use `SFTTrainer`, or pass a DistillationConfig"),
        (MySFT, "Pass a DistillationConfig, or derive your config from it"),
    ],
)
def test_a_config_of_another_trainer_is_refused(config, given, remedy):
    with pytest.raises(
        TypeError, match=f"`args` is a {given.__name__}, whose `.*` this trainer does not have. {remedy}"
    ):
        own_config(hf_rb.DistillationConfig, given(**config), "model", "Distillation")


@dataclass
class MyRun(hf_rb.SFTConfig):
    my_flag: int = 3


@dataclass
class MyTeaching(compat.GKDConfig):
    pass


NAMES = ("SFT", "GKD", "Distillation", "GRPO")


@pytest.mark.parametrize(("given", "wanted"), permutations(NAMES, 2))
def test_own_config_of_another_of_our_trainers_is_refused(config, given, wanted):
    args = getattr(hf_rb, f"{given}Config")(**config, **{"num_generations": 2} if given == "GRPO" else {})
    message = (
        f"`args` is a {given}Config, whose `.*` this trainer does not have. Use `{given}Trainer`, or pass a {wanted}C"
    )
    with pytest.raises(TypeError, match=message):
        own_config(getattr(hf_rb, f"{wanted}Config"), args, "model", wanted)


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (compat.GKDConfig, "Use `GKDTrainer`, or pass a SFTConfig"),
        (GKDArguments, "Use `GKDTrainer`, or pass a SFTConfig"),
        (MyTeaching, "Pass a SFTConfig, or derive your config from it"),
    ],
)
def test_sft_trainer_refuses_the_config_of_gkd(student, config, given, remedy):
    data = tiny.load_dataset("math", config="messages", size=4)
    with pytest.raises(TypeError, match=f"`args` is a {given.__name__}, whose `beta` this .* does not have. {remedy}"):
        hf_rb.SFTTrainer(str(student), given(**config), train_dataset=data)


def test_own_config_names_the_trainer_that_a_config_is_for(config):
    with pytest.raises(TypeError, match="`args` is a MyRun, .* Use `SFTTrainer`, or pass a GKDConfig"):
        own_config(hf_rb.GKDConfig, MyRun(**config), "model", "GKD")
    # The class that stands in for a config of TRL's has both among its bases.
    args = own_config(hf_rb.SFTConfig, MySFT(**config), "model", "SFT")
    with pytest.raises(TypeError, match="`args` is a MySFT, .* Use `SFTTrainer`, or pass a GKDConfig"):
        own_config(hf_rb.GKDConfig, args, "model", "GKD")
    assert own_config(hf_rb.SFTConfig, MyRun(**config), "model", "SFT").my_flag == 3


def test_arguments_may_be_missing():
    assert own_config(lambda output_dir: output_dir, None, "organization/model", "SFT") == "model-SFT"
