r"""Deviation-aware correction (DAC, https://huggingface.co/papers/2602.02546): the mean that quantization moved is put
back.

With y_T the output of a norm before quantization and y_S after it, on the same inputs and for T tokens, the bias

    b = 1/T sum_t (y_T - y_S),   clamped to +-10

of that norm lowers the mean square of y_T - y_S in every channel by exactly the square of its mean, where nothing is
clamped. Whatever reads the norm is linear, so that b may as well be a bias there: W b, with W as it is quantized.
"""

import torch
from torch import Tensor


__all__ = ["MeanShift", "fold"]


class MeanShift:
    """
    Gathers what a norm's output lost, in float64.

    Args:
        channels (`int`):
            Channels of the norm.

    Attributes:
        tokens (`int`): Tokens seen.
    """

    def __init__(self, channels: int):
        self.tokens = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Adds the outputs of the norm `(..., channels)` for the same tokens, before and after quantization."""
        lost = (teacher.double() - student.double()).flatten(0, -2)
        self.tokens += len(lost)
        self._sum += lost.sum(0).cpu()
        self._squares += lost.square().sum(0).cpu()

    @property
    def mean(self) -> Tensor:
        """Mean of what was lost, float64 `(channels,)`."""
        return self._sum / self.tokens

    @property
    def mean_square(self) -> Tensor:
        """Mean square of what was lost, float64 `(channels,)`."""
        return self._squares / self.tokens

    def bias(self, clip: float = 10.0) -> Tensor:
        """Returns b, float32 `(channels,)`."""
        return self.mean.clamp(-clip, clip).float()

    def mean_square_with(self, bias: Tensor) -> Tensor:
        """Returns the mean square of what is still lost with a bias of the norm, float64 `(channels,)`."""
        bias = bias.double().cpu()
        return self.mean_square - 2 * bias * self.mean + bias.square()


def fold(weight: Tensor, bias: Tensor | None, shift: Tensor) -> Tensor:
    """
    Returns the bias of a linear layer that has the effect of a bias of the norm which it reads.

    Args:
        weight (`torch.Tensor`):
            The layer's weight as it computes with it, dequantized, `(out_features, in_features)`.
        bias (`torch.Tensor`, *optional*):
            Its bias so far, `(out_features,)`.
        shift (`torch.Tensor`):
            The norm's bias, `(in_features,)`.

    Returns:
        `torch.Tensor`: `(out_features,)`, in at least float32.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    folded = torch.mv(weight.to(dtype), shift.to(weight.device, dtype))
    return folded if bias is None else folded + bias
