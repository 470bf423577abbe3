"""A damaged checkpoint in two processes, of which each reads a part."""

from pathlib import Path

import torch
from sft_cases import TRAINER
from transformers import Trainer


def save_models(folder):
    TRAINER.save_models(folder)


def resume(folder):
    """Damages the newest checkpoint of a run, then every one; returns the step resumed from, and the error."""
    config = {"per_device_train_batch_size": 2, "output_dir": str(folder), "save_strategy": "steps", "save_steps": 1}
    TRAINER.train(max_steps=2, **config)
    is_main = torch.distributed.get_rank() == 0

    def damage(step):  # the other process's file
        if is_main:
            Path(folder, f"checkpoint-{step}", "rng_state_1.pth").unlink()

    damage(2)
    checkpoints = []
    original, Trainer.train = Trainer.train, lambda self, checkpoint, *_, **__: checkpoints.append(checkpoint)
    try:
        TRAINER.train(resume_from_checkpoint=True, **config)
        damage(1)
        TRAINER.train(resume_from_checkpoint=True, **config)
    except ValueError as error:
        return Path(checkpoints[0]).name, str(error)
    finally:
        Trainer.train = original


def two_processes(models, folder):
    TRAINER.models = models
    found = [None, None]
    torch.distributed.all_gather_object(found, resume(folder / "run"))
    return found
