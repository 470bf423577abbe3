"""Short distillation runs with given completions that the equivalence tests compare; as a script, the same in two processes.

torchrun --standalone --nproc_per_node 2 distillation_cases.py MODELS OUTPUT.pt
"""

import random
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_utils import set_seed

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
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    for seed, (name, hidden, padding) in enumerate(
        [("student", 64, 0), ("teacher", 96, 24), ("other", 64, 0), ("reference", 64, 0)]
    ):
        set_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer) + padding,
            hidden_size=hidden,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            tie_word_embeddings=True,
            initializer_range=0.05,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        Qwen3ForCausalLM(config).save_pretrained(Path(folder, name))
        tokenizer.save_pretrained(Path(folder, name))


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
                "output_dir": folder,
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "optim": "sgd",  # proportional to the gradient, where Adam would hide its scale
                "learning_rate": 0.1,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 1e3,
                "shuffle_dataset": False,
                "max_completion_length": 12,
                "max_steps": STEPS,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
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
    ignored = ("runtime", "per_second", "epoch", "step_time")
    logs = [
        {key: value for key, value in entry.items() if not key.endswith(ignored)}
        for entry in trainer.state.log_history
    ]
    weights = {
        name: weight.detach().clone()
        for name, weight in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }
    return logs, weights, trainer


if __name__ == "__main__":
    models, output = sys.argv[1:]
    results = {name: train(models, per_device_train_batch_size=2, **case)[:2] for name, case in CASES.items()}
    results["accumulated"] = train(
        models, per_device_train_batch_size=1, gradient_accumulation_steps=2, **CASES["exopd"]
    )[:2]
    if torch.distributed.get_rank() == 0:
        torch.save(results, output)
    torch.distributed.destroy_process_group()
