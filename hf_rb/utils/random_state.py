"""Global random states that stay as they are."""

import random
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import numpy as np
import torch


__all__ = ["random_states_kept"]


@contextmanager
def random_states_kept(devices: Iterable[int] = ()) -> Generator[None]:
    """Gives Python's, NumPy's and torch's random states back as they were. `devices` are the GPUs whose states count
    too.
    """
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
