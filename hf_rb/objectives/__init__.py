"""The methods' mathematics as pure functions of tensors. Nothing here knows a trainer, a model or a file."""

from hf_rb.objectives.profit import profit_mask


__all__ = ["profit_mask"]
