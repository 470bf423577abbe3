"""The loss of a token with its derivative, as the tile loop of `hf_rb.ops.lm_head` takes it from an objective."""

from typing import NamedTuple, Protocol

import torch


__all__ = ["Term", "TokenRule"]


class Term(NamedTuple):
    """Result of a [`TokenRule`] for a block of n tokens over E events (the vocabulary, or a cache's events).

    Attributes:
        loss (`torch.Tensor` of shape `(n,)`):
            Loss of every token.
        dense (`torch.Tensor` of shape `(n, E)`, *optional*):
            Derivative of the loss by the log-probability of every event.
        picks (`torch.Tensor` of shape `(n, k)`, *optional*):
            Token ids with a derivative beside `dense`.
        values (`torch.Tensor` of shape `(n, k)`, *optional*):
            That derivative.
        stats (`dict[str, torch.Tensor]`):
            More values of shape `(n,)`, for metrics.
    """

    loss: torch.Tensor
    dense: torch.Tensor | None
    picks: torch.Tensor | None
    values: torch.Tensor | None
    stats: dict[str, torch.Tensor]


class TokenRule(Protocol):
    """
    A loss by token. `log_q` and `log_p` are `(n, E)`; `log_probs` are the student's over the whole vocabulary,
    `(n, V)`. Without a teacher `log_p` is `None`.

    With a cached teacher, `tokens["rest"]` holds the teacher's log-probability of the last event, `(n,)`. That event
    is all tokens that are not stored: a rule that takes a maximum or an order over the events must not take it for a
    token.
    """

    def __call__(
        self,
        log_q: torch.Tensor,
        log_p: torch.Tensor | None,
        log_probs: torch.Tensor,
        tokens: dict[str, torch.Tensor],
    ) -> Term: ...
