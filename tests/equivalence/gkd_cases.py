"""Short seeded GKD runs that the equivalence tests compare, in one process and in two."""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from helpers.random_models import save_qwen3
from helpers.seeded_runs import ARGUMENTS, logs_and_weights
from transformers import AutoTokenizer

from hf_rb import GKDConfig, GKDTrainer, tiny
from hf_rb.teachers import LocalTeacher


STEPS = 2
VOCABULARY = 128
CASES = {
    "jsd": {"objective": "jsd", "beta": 0.3, "lmbda": 0.0},
    "forward_kl": {"objective": "forward_kl", "lmbda": 0.0},
    "reverse_kl": {"objective": "reverse_kl", "lmbda": 0.0},
    "akl": {"objective": "akl", "lmbda": 0.0},
    "akl, mixed": {"objective": "akl", "akl_head_rule": "code", "kd_alpha": 0.5, "lmbda": 0.0},
    "loca": {"objective": "forward_kl", "loca_alpha": 0.95, "kd_alpha": 0.9, "lmbda": 0.0},
    "hpd": {"objective": "hpd", "lmbda": 0.0},
    "hpd, no sample": {"objective": "hpd", "hpd_sample": False, "lmbda": 0.0},
    "opd": {"objective": "gopd", "lmbda": 1.0, "temperature": 1.0},
    "exopd": {"objective": "gopd", "reward_scale": 1.25, "lmbda": 1.0, "temperature": 1.0},
    "exopd, tokens": {
        "objective": "gopd",
        "reward_scale": 1.25,
        "gopd_aggregation": "token-mean",
        "gopd_logratio_clamp": 0.5,
        "lmbda": 1.0,
        "temperature": 1.0,
    },
    "exopd, full": {
        "objective": "gopd",
        "reward_scale": 1.25,
        "gopd_full_vocab": True,
        "gopd_aggregation": "seq-mean-token-sum",
        "lmbda": 1.0,
        "temperature": 1.0,
    },
    "on-policy jsd": {"objective": "jsd", "lmbda": 1.0},
    # From the dataset at the first step, from the student at the second.
    "mixed": {"objective": "reverse_kl", "lmbda": 0.3},
}


def save_models(folder, vocabulary=VOCABULARY, padding=32):
    """A random student and a wider teacher with more padding in its vocabulary."""
    save_qwen3(Path(folder, "student"), vocab_size=vocabulary)
    save_qwen3(Path(folder, "teacher"), seed=1, hidden_size=96, vocab_size=vocabulary + padding)


def documents():
    """Twelve documents of unequal lengths with prompts; the last, of one token, has neither a prompt nor a prediction."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 12, 3, 9, 14, 4, 8, 7, 2, 11, 6, 1):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        start = length // 4 or int(length > 1)
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def halves():
    """Documents of which every second has nothing to predict."""
    return [row for document in documents()[:STEPS] for row in (document, {"input_ids": [7], "labels": [7]})]


def local(models, model=None):
    """The saved teacher, or a model, with the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    return LocalTeacher(model or str(Path(models, "teacher")), tokenizer=tokenizer)


class Injected(GKDTrainer):
    """Takes each completion from a function of its prompt, so that it does not depend on the batch."""

    def _sample(self, writer, prompts):
        completions = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(int(prompt.sum()) + self.state.global_step)
            length = int(torch.randint(1, 9, (1,), generator=generator))
            completions.append(torch.randint(3, VOCABULARY, (length,), generator=generator).to(prompt))
        return completions


def train(models, trainer_class=Injected, config_class=GKDConfig, rows=None, **config):
    """Trains the saved student; returns what was logged at each step and the weights at the end."""
    keywords = {key: config.pop(key) for key in ("peft_config", "teacher", "data_collator") if key in config}
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            **{
                **ARGUMENTS,
                "output_dir": folder,
                "train_sampling_strategy": "sequential",
                "max_steps": STEPS,
                **config,
            }
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
        if issubclass(trainer_class, GKDTrainer):
            keywords.setdefault("teacher", local(models))
        else:
            keywords["teacher_model"] = str(Path(models, "teacher"))
        trainer = trainer_class(
            str(Path(models, "student")),
            args=args,
            train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows or documents()),
            processing_class=tokenizer,
            **keywords,
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return logs_and_weights(trainer)


def two_processes(models, folder):
    """Every case on both processes, in half the batch."""
    results = {name: train(models, per_device_train_batch_size=2, **case) for name, case in CASES.items()}
    results["accumulated"] = train(
        models, per_device_train_batch_size=1, gradient_accumulation_steps=2, **CASES["hpd"]
    )
    for name in ("akl, mixed", "hpd"):
        results[f"{name}, one with nothing"] = train(
            models, rows=halves(), per_device_train_batch_size=1, **CASES[name]
        )
    return results
