"""
Rows of several trainers in two processes, in one launch, since importing the libraries costs more than training.

torchrun --standalone --nproc_per_node 2 two_processes.py FOLDER

FOLDER/plan.pickle holds the folders of the trainers' models, the rows as (trainer, row, split, path), and the names of modules beside
this one: what `two_processes(models, folder)` of a module returns, with its models in FOLDER/NAME, is saved with the trained rows in
FOLDER/found.pt.
"""

import pickle
import sys
from importlib import import_module
from pathlib import Path

import torch


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    models, rows, extras = pickle.loads((folder / "plan.pickle").read_bytes())
    trainers = {}
    for name, place in models.items():
        trainers[name] = import_module(f"{name}_cases").TRAINER
        trainers[name].models = Path(place)
    found = {}
    for key in rows:
        name, row, split, path = key
        run = trainers[name].train_row(trainers[name].rows[row], split, path)
        found[key] = (run.logs, run.weights)
    for name in extras:
        found[name] = import_module(name).two_processes(folder / name, folder)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()
