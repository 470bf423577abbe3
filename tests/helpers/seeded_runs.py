"""What the runs that equivalence tests compare have in common, and how a file of such runs is a script for two processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch


__all__ = ["ARGUMENTS", "in_two_processes", "logs_and_weights", "python_path", "save_results"]

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


def in_two_processes(script, models, output):
    """Runs a file of cases with torchrun; returns what it saved."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    subprocess.run([*launch, script, models, output], check=True, timeout=300, env=environment)
    return torch.load(output)


def save_results(results, output):
    """Ends the script that `in_two_processes` has started."""
    if torch.distributed.get_rank() == 0:
        torch.save(results, output)
    torch.distributed.destroy_process_group()
