"""Short distillation runs with given completions that the equivalence tests compare, in one process and in two."""

import random
import tempfile
from pathlib import Path

from datasets import Dataset
from helpers.random_models import save_qwen3
from helpers.seeded_runs import ARGUMENTS, logs_and_weights

from hf_rb import DistillationConfig, DistillationTrainer, tiny


STEPS = 2
EXOPD = {"objective": "gopd", "reward_scale": 1.25}
CASES = {
    "forward_kl": {"objective": "forward_kl"},
    "reverse_kl": {"objective": "reverse_kl", "temperature": 1.5},
    "akl": {"objective": "akl"},
    "opd": {"objective": "gopd"},
    "exopd": EXOPD,
    "token-mean": {**EXOPD, "gopd_aggregation": "token-mean"},
    "token-sum": {**EXOPD, "gopd_aggregation": "seq-mean-token-sum"},
    "full": {**EXOPD, "gopd_full_vocab": True},
    "clamp": {**EXOPD, "gopd_logratio_clamp": 0.05},
    "routed": {**EXOPD, "gopd_teacher_column": "domain"},
}


def save_models(folder):
    """A random student; a wider teacher, whose logits are padded; and two more of the student's size."""
    different = {"teacher": {"hidden_size": 96, "padding": 24}}
    for seed, name in enumerate(("student", "teacher", "other", "reference")):
        save_qwen3(Path(folder, name), seed, initializer_range=0.05, **different.get(name, {}))


def prompts(count=12):
    rows = tiny.load_dataset("math", config="prompt_only", size=count).to_list()
    return [{"prompt": row["prompt"], "domain": "math" if index % 3 else "code"} for index, row in enumerate(rows)]


def completion_of(prompt):
    """A completion that follows from the ids of the prompt, of 1 to 12 tokens."""
    draw = random.Random(str(prompt))
    return [draw.randrange(3, 250) for _ in range(draw.randrange(1, 13))]


class Trainer(DistillationTrainer):
    """Takes the completions above in place of sampling any."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [completion_of(prompt) for prompt in prompt_ids]


def train(
    models, trainer_class=Trainer, config_class=DistillationConfig, teacher="teacher", rows=None, peft=None, **config
):
    """Trains the saved student; returns what was logged at each step, the weights at the end, and the trainer."""
    if config.get("gopd_teacher_column"):
        teacher = {"math": str(Path(models, "teacher")), "code": str(Path(models, "other"))}
    elif isinstance(teacher, str):
        teacher = str(Path(models, teacher))
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            **{
                **ARGUMENTS,
                "output_dir": folder,
                "shuffle_dataset": False,
                "max_completion_length": 12,
                "max_steps": STEPS,
                **config,
            }
        )
        trainer = trainer_class(
            str(Path(models, "student")),
            teacher,
            args,
            Dataset.from_list(rows or prompts()),
            peft_config=peft,
        )
        trainer.train()
    return *logs_and_weights(trainer), trainer


def two_processes(models, folder):
    """Every case on both processes, in half the batch."""
    results = {name: train(models, per_device_train_batch_size=2, **case)[:2] for name, case in CASES.items()}
    results["accumulated"] = train(
        models, per_device_train_batch_size=1, gradient_accumulation_steps=2, **CASES["exopd"]
    )[:2]
    return results
