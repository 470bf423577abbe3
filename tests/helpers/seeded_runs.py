"""What the runs that equivalence tests compare have in common."""

import os
from pathlib import Path


__all__ = ["ARGUMENTS", "Runs", "logs_and_weights", "python_path"]

ARGUMENTS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "sgd",  # proportional to the gradient, where Adam would hide its scale
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class Runs(dict):
    """Trained runs by the names of their cases, each trained when a test first asks for it."""

    def __init__(self, train):
        self.train = train

    def __missing__(self, name):
        self[name] = self.train(name)
        return self[name]


def logs_and_weights(trainer):
    """What a trainer has logged that another run of the same training must log too, and its weights."""
    ignored = ("runtime", "per_second", "epoch", "num_tokens", "step_time")
    logs = [
        {key: value for key, value in entry.items() if not key.endswith(ignored)}
        for entry in trainer.state.log_history
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return logs, {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def python_path():
    """`PYTHONPATH` of a process that imports `helpers`."""
    tests = str(Path(__file__).parents[1])
    return os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
