"""The rows of all trainers, how tests choose among them, and what two trainings of a row must have in common."""

from importlib import import_module

import pytest
import torch
from described import STEPS
from helpers.records import documented

from hf_rb.teachers import cache_teacher


__all__ = [
    "OURS", "ROWS", "TRAINERS", "assert_same_training", "capture", "group_of", "is_fast", "is_ours", "named", "row_of", "selected"
]  # fmt: skip

TRAINERS = {name: import_module(f"{name}_cases").TRAINER for name in ("sft", "gkd", "distillation", "grpo")}
ROWS = [(name, row) for name, trainer in TRAINERS.items() for row in trainer.rows]
OURS = documented()


def row_of(key):
    return TRAINERS[key[0]].rows[key[1]]


def group_of(key):
    row = row_of(key)
    return row.group or (row.methods or (row.name,))[0]


def selected(fast, rows=ROWS):
    """Parametrizes a test by rows. Those of which `fast` says so run in the fast tests."""
    return pytest.mark.parametrize(
        "key",
        [pytest.param(key, id="-".join(key), marks=() if fast(key) else pytest.mark.slow) for key in rows],
    )


def is_fast(key):
    """Whether the fast tests train a row in any case."""
    return not row_of(key).minor or row_of(key).methods == ("hpd",)  # where a choice changes what is logged


def named(**names):
    """Rows by trainer."""
    return lambda key: key[1] in names.get(key[0], ())


def is_ours(trainer, name):
    """Whether a number must not depend on how a batch is split."""
    if name in ("loss", "grad_norm") or name.startswith(trainer.also):
        return True
    return name in OURS - trainer.theirs


def assert_same_training(trainer, actual, expected, steps=slice(STEPS)):
    for entry, expected_entry in zip(actual[0][steps], expected[0][steps], strict=True):
        names = {name for name in expected_entry if is_ours(trainer, name)}
        assert names == {name for name in entry if is_ours(trainer, name)}
        for name in names:
            value = pytest.approx(expected_entry[name], rel=trainer.rel, abs=trainer.abs)
            assert entry[name] == value, name
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=trainer.weights_abs)


def capture(one, folder, k, **keys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.trainer, "train", lambda trainer, **_: cache_teacher(trainer, folder, k=k, dtype="float32"))
        one.train(**keys)
