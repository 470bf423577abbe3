"""
Cases of several trainers in two processes, in one launch, since importing the libraries costs more than training.

torchrun --standalone --nproc_per_node 2 two_processes.py FOLDER NAME ...

Every NAME is a module beside this one: `two_processes(models, folder)` trains its cases from the models in FOLDER/NAME, and what it
returns is saved as FOLDER/NAME.pt.
"""

import sys
from importlib import import_module
from pathlib import Path

import torch


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for name in names:
        results = import_module(name).two_processes(Path(folder, name), Path(folder))
        if torch.distributed.get_rank() == 0:
            torch.save(results, Path(folder, f"{name}.pt"))
    torch.distributed.destroy_process_group()
