"""Queries of a model's LM head about hidden states, without gradient and without keeping the logits of all tokens."""

from typing import NamedTuple

import torch

from hf_rb.ops.lm_head import Head, logit_blocks, project


__all__ = ["TopK", "lm_head_log_probs", "lm_head_logits", "lm_head_top_k"]


def lm_head_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Returns all logits `(N, V)` of hidden states `(N, H)` in float32, without gradient: for few rows."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return project(hidden, head, 1.0, head.width(hidden))


def lm_head_log_probs(
    hidden: torch.Tensor, head: Head, ids: torch.Tensor, temperature: float = 1.0, vocabulary: int | None = None
) -> torch.Tensor:
    """
    Log-probabilities of given tokens, without gradient.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Last hidden states.
        head ([`Head`]):
            LM head.
        ids (`torch.Tensor` of shape `(N,)`):
            One token id a row.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits.
        vocabulary (`int`, *optional*):
            Number of leading ids that take part.

    Returns:
        `torch.Tensor` of shape `(N,)`: Log-probabilities in float32.
    """
    vocabulary = vocabulary or head.width(hidden)
    result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for rows, logits in logit_blocks(hidden, head, temperature, vocabulary):
        picked = logits.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1)
        result[rows] = picked - logits.logsumexp(-1)
    return result


class TopK(NamedTuple):
    """Result of [`lm_head_top_k`].

    Attributes:
        ids (`torch.Tensor` of shape `(N, m)`):
            Distinct token ids, the k most probable first.
        log_probs (`torch.Tensor` of shape `(N, m)`):
            Their log-probabilities in float32.
        rest (`torch.Tensor` of shape `(N,)`):
            Log-probability of all other ids together; -inf if there are none.
        entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of the whole distribution, in nats.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor
    entropy: torch.Tensor


def lm_head_top_k(
    hidden: torch.Tensor, head: Head, k: int, labels: torch.Tensor, vocabulary: int | None = None
) -> TopK:
    """
    The most probable tokens and the label, without gradient: what a cached teacher keeps of a distribution.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Last hidden states.
        head ([`Head`]):
            LM head.
        k (`int`):
            Number of tokens. m = min(k + 1, V) are returned: the last one is the label if it is not among the first k,
            else the next most probable token.
        labels (`torch.Tensor` of shape `(N,)`):
            One token id a row.
        vocabulary (`int`, *optional*):
            Number of leading ids that take part.

    Returns:
        [`TopK`]: Ids, their log-probabilities, that of the rest, and entropies.
    """
    vocabulary = vocabulary or head.width(hidden)
    size, device = (len(hidden), min(k + 1, vocabulary)), hidden.device
    result = TopK(
        ids=torch.empty(size, dtype=torch.int64, device=device),
        log_probs=torch.empty(size, dtype=torch.float32, device=device),
        rest=torch.empty(len(hidden), dtype=torch.float32, device=device),
        entropy=torch.empty(len(hidden), dtype=torch.float32, device=device),
    )
    for rows, logits in logit_blocks(hidden, head, 1.0, vocabulary):
        ids, label = logits.topk(size[1]).indices, labels[rows]
        is_outside = (ids[:, :k] != label.unsqueeze(-1)).all(-1)
        ids[:, -1] = torch.where(is_outside, label, ids[:, -1])
        log_probs = logits.log_softmax(-1)
        result.ids[rows], result.log_probs[rows] = ids, log_probs.gather(-1, ids)
        result.rest[rows] = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
        result.entropy[rows] = torch.special.entr(log_probs.exp_()).sum(-1)
    return result
