"""Communication of processes beside gradients."""

import torch
from accelerate import PartialState


__all__ = ["on_any_process"]


def on_any_process(found: bool) -> bool:
    """Returns whether a condition holds on any process. All processes must call it."""
    if not torch.distributed.is_initialized():
        return found
    flag = torch.tensor(int(found), device=PartialState().device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
