"""Short seeded SFT runs that the equivalence tests compare, in one process and in two."""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from helpers.random_models import save_qwen3
from helpers.seeded_runs import ARGUMENTS, logs_and_weights
from transformers import AutoTokenizer, Trainer

from hf_rb import SFTConfig, SFTTrainer, tiny


STEPS = 3
CASES = {
    "off": {},
    "higher": {"profit_threshold": 0.0085},
    "lower": {"profit_threshold": 0.0085, "profit_mode": "lower"},
    "middle": {"profit_threshold": 0.006, "profit_mode": "middle", "profit_threshold_high": 0.011},
    "random": {"profit_threshold": 0.4, "profit_mode": "random"},
    "sequence": {"profit_threshold": 0.0085, "profit_normalize": "sequence"},
    "random sequence": {"profit_threshold": 0.4, "profit_mode": "random", "profit_normalize": "sequence"},
}


def save_models(folder):
    """A random Qwen3 whose label probabilities scatter around 1/vocabulary, on both sides of the thresholds above."""
    save_qwen3(folder, vocab_size=128)


def documents():
    """Twelve documents of unequal lengths, with prompts without labels; of one token, nothing is predicted."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 12, 3, 9, 14, 4, 8, 1, 2, 11, 6, 7):
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
    return rows


def train(model, trainer_class=SFTTrainer, config_class=SFTConfig, rows=None, **config):
    """Trains from the saved model; returns what was logged at each step and the weights at the end."""
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
        trainer = trainer_class(
            str(model),
            args,
            train_dataset=Dataset.from_list(rows or documents()),
            processing_class=AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer"),
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return logs_and_weights(trainer)


def resume(model, folder):
    """Damages the newest checkpoint of a run, then every one; returns the step resumed from, and the error."""
    config = {"per_device_train_batch_size": 2, "output_dir": str(folder), "save_strategy": "steps", "save_steps": 1}
    train(model, max_steps=2, **config)
    is_main = torch.distributed.get_rank() == 0

    def damage(step):  # the other process's file
        if is_main:
            Path(folder, f"checkpoint-{step}", "rng_state_1.pth").unlink()

    damage(2)
    checkpoints = []
    original, Trainer.train = Trainer.train, lambda self, checkpoint, *_, **__: checkpoints.append(checkpoint)
    try:
        train(model, resume_from_checkpoint=True, **config)
        damage(1)
        train(model, resume_from_checkpoint=True, **config)
    except ValueError as error:
        return Path(checkpoints[0]).name, str(error)
    finally:
        Trainer.train = original


def two_processes(model, folder):
    """Every case on both processes, in half the batch."""
    results = {name: train(model, per_device_train_batch_size=2, **case) for name, case in CASES.items()}
    results["accumulated"] = train(
        model, per_device_train_batch_size=1, gradient_accumulation_steps=2, **CASES["random sequence"]
    )
    results["resume"] = [None, None]
    torch.distributed.all_gather_object(results["resume"], resume(model, folder / "run"))
    return results
