"""Rows of distillation on given completions of the student."""

import random

import pytest
import trl
from datasets import Dataset, IterableDataset
from described import Described, Row, batch, variants
from helpers.fake_vllm import fake_vllm
from helpers.random_models import save_qwen3
from peft import LoraConfig

from hf_rb import DistillationConfig, DistillationTrainer, tiny
from hf_rb.methods.registry import methods


BATCHES = {
    "whole": batch(4), "1 x 4": batch(1, 4), "2 x 2": batch(2, 2), "2 processes": batch(2), "2 processes x 2": batch(1, 2)
}  # fmt: skip
EXOPD = {"objective": "gopd", "reward_scale": 1.25}
OFF = {
    "plain": {},
    "adam, accumulation, shuffled": {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
        "shuffle_dataset": True,
        "beta": 0.5,
    },
    "bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True, "beta": 0.0, "temperature": 1.3},
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "learning_rate": 1.0},
}
OFF = {name: {"per_device_train_batch_size": 2, "teacher": "other", **keys} for name, keys in OFF.items()}


def rows():
    """Every objective that takes completions of the student, with every other choice of its flags, and more of G-OPD."""
    for name, entry in methods("objective").items():
        if entry.method.completions != "dataset":
            yield Row(name, {"objective": name}, (name,))
            for label, flags in variants(entry.method):
                yield Row(f"{name}, {label}", {"objective": name, **flags}, (name,), minor=True)
    yield Row("jsd, beta", {"beta": 0.3, "temperature": 1.4}, ("jsd",))
    yield Row("reverse_kl, temperature", {"objective": "reverse_kl", "temperature": 1.5}, ("reverse_kl",))
    more = {
        "exopd": {},
        "token-mean": {"gopd_aggregation": "token-mean"},
        "token-sum": {"gopd_aggregation": "seq-mean-token-sum"},
        "full": {"gopd_full_vocab": True},
        "clamp": {"gopd_logratio_clamp": 0.05},
        "routed": {"gopd_teacher_column": "domain"},
        "tis": {"gopd_tis_cap": 1.2, "use_vllm": True},
    }
    for name, flags in more.items():
        yield Row(
            name,
            EXOPD | flags,
            ("gopd",),
            group=name if name in ("exopd", "token-mean", "token-sum", "routed") else "",
        )


def prompts(count=12):
    found = tiny.load_dataset("math", config="prompt_only", size=count).to_list()
    return [{"prompt": row["prompt"], "domain": "math" if index % 3 else "code"} for index, row in enumerate(found)]


def completion_of(prompt):
    """A completion that follows from the ids of the prompt, of 1 to 12 tokens."""
    draw = random.Random(str(prompt))
    return [draw.randrange(3, 250) for _ in range(draw.randrange(1, 13))]


class Injected(DistillationTrainer):
    """Takes the completions above in place of sampling any."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [completion_of(prompt) for prompt in prompt_ids]


class Distillation(Described):
    def save_models(self, folder):
        """A random student; a wider teacher, whose logits are padded; and two more of the student's size."""
        different = {"teacher": {"hidden_size": 96, "padding": 24}}
        for seed, name in enumerate(("student", "teacher", "other", "reference")):
            save_qwen3(folder / name, seed, initializer_range=0.05, **different.get(name, {}))

    def data(self):
        return Dataset.from_list(prompts())

    def make(self, trainer_class, config_class, config, objects):
        teacher = objects.get("teacher", "teacher")
        if config.get("gopd_teacher_column"):
            teacher = {"math": str(self.models / "teacher"), "code": str(self.models / "other")}
        elif isinstance(teacher, str):
            teacher = str(self.models / teacher)
        given = objects.get("rows") or prompts()
        with pytest.MonkeyPatch.context() as patch:
            if config.get("use_vllm"):
                fake_vllm(patch, completion_of, lambda index, prompt: sum(prompt) % 3 == 0)
                trainer_class = DistillationTrainer
            return trainer_class(
                str(self.models / "student"),
                teacher,
                config_class(**{"shuffle_dataset": False, "max_completion_length": 12, **config}),
                given if isinstance(given, Dataset | IterableDataset) else Dataset.from_list(given),
                peft_config=objects.get("peft_config"),
            )


TRAINER = Distillation(
    "distillation", DistillationTrainer, DistillationConfig, trl.DistillationTrainer, trl.DistillationConfig, BATCHES, Injected,
    {row.name: row for row in rows()}, OFF, frozenset({"entropy"}),
)  # fmt: skip
