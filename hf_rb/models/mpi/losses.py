"""
Auxiliary losses of a router: balance per sequence or per layer, beside transformers' own, and the z-loss.

With N experts of which a token picks K, the balance loss of one layer over the S tokens of one sequence is

    f_i = N / (K S) #{tokens that pick i},  p_i = mean over tokens of softmax(z)_i,  loss = Σ_i f_i p_i  (1 at balance)

averaged over sequences and layers (https://huggingface.co/papers/2606.12397, its released code). transformers adds up
the picks and the probabilities of all layers and sequences before it multiplies them, and does not divide by K: layers
that collapse on different experts look balanced there, and 0.01 here is about 0.01 / K there. Only p has a gradient.

Shapes: `router_logits` is a tuple of one `(B*L, N)` tensor a layer, as a model returns them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor


__all__ = ["BalanceType", "auxiliary_loss", "balance_loss", "check_z_loss", "sequence_ids", "z_loss"]

BalanceType = Literal["sequence", "layer", "hf"]


def auxiliary_loss(
    config: Any,
    router_logits: Sequence[Tensor],
    shape: tuple[int, int],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """
    Returns what a mixture of experts gives as `aux_loss`, which trainers multiply by `config.router_aux_loss_coef`.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Has `num_experts_per_tok` and may have `lb_type` (`"sequence"`, `"layer"` or `"hf"`, the default) and
            `z_loss_coef`, the weight of the z-loss in the final loss.
        router_logits (`Sequence[torch.Tensor]`):
            Of each layer, `(B*L, N)`.
        shape (`tuple[int, int]`):
            B and L.
        attention_mask, position_ids (`torch.Tensor` of shape `(B, L)`, *optional*):
            As in [`sequence_ids`].

    Raises:
        ValueError: There is a z-loss but no `router_aux_loss_coef` that would let it act.
    """
    check_z_loss(config)
    kind, top_k = getattr(config, "lb_type", "hf"), config.num_experts_per_tok
    if kind == "hf":
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        # Its annotations know models of one layer only, and the 0 that it returns for one of none.
        balance: Callable[..., Any] = load_balancing_loss_func
        loss = balance(tuple(router_logits), router_logits[0].shape[-1], top_k, attention_mask)
    else:
        ids, count = sequence_ids(shape, router_logits[0].device, attention_mask, position_ids)
        loss = balance_loss(router_logits, top_k, *((ids, count) if kind == "sequence" else (ids.clamp(max=0), 1)))
    weight = getattr(config, "z_loss_coef", 0.0)
    if not weight:
        return loss
    tokens = None if attention_mask is None else attention_mask.reshape(-1) > 0
    return loss + weight / config.router_aux_loss_coef * z_loss(router_logits, tokens)


def check_z_loss(config: Any) -> None:
    """
    Raises:
        ValueError: There is a z-loss but no `router_aux_loss_coef` that would let it act.
    """
    if (weight := getattr(config, "z_loss_coef", 0.0)) and not config.router_aux_loss_coef:
        raise ValueError(
            f"z_loss_coef={weight} cannot act with router_aux_loss_coef=0, by which trainers multiply all auxiliary "
            "losses. Set `router_aux_loss_coef` to the weight of the balance loss, 0.01 in the paper, or "
            "`z_loss_coef=0`."
        )


def sequence_ids(
    shape: tuple[int, int],
    device: torch.device | str = "cpu",
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, int]:
    """
    Says which sequence every token of a batch belongs to.

    Args:
        shape (`tuple[int, int]`):
            B and L.
        device (`torch.device`, *optional*, defaults to `"cpu"`):
            Where the result goes.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            0 at padding.
        position_ids (`torch.Tensor` of shape `(B, L)`, *optional*):
            Without a mask, a position 0 begins a sequence: rows of packed sequences come apart.

    Returns:
        `tuple[torch.Tensor, int]`: Ids `(B*L,)`, -1 at padding, and their number.
    """
    rows, length = shape
    if attention_mask is None and position_ids is not None:
        starts = (position_ids == 0).expand(rows, length).clone().to(device)
        starts[:, 0] = True
        ids = starts.reshape(-1).cumsum(0) - 1
        return ids, int(ids[-1]) + 1
    ids = torch.arange(rows, device=device).repeat_interleave(length)
    if attention_mask is not None:
        ids = ids.masked_fill(attention_mask.reshape(-1).to(device) == 0, -1)
    return ids, rows


def balance_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    ids: Tensor | None = None,
    count: int = 1,
    score_func: Literal["softmax", "sigmoid"] = "softmax",
) -> Tensor:
    """
    Computes the balance loss of every sequence in every layer, and their mean.

    Args:
        router_logits (`Sequence[torch.Tensor]`):
            Of each layer, `(T, N)`.
        top_k (`int`):
            Experts K that a token picks.
        ids (`torch.Tensor` of shape `(T,)`, *optional*):
            Sequence of each token, -1 for one that does not count; see [`sequence_ids`]. Without it all tokens are one
            sequence.
        count (`int`, *optional*, defaults to `1`):
            Number of sequences. One without tokens does not count.
        score_func (`str`, *optional*, defaults to `"softmax"`):
            What makes scores of logits; those of `"sigmoid"` are divided by their sum.

    Returns:
        `torch.Tensor`: Scalar, float32. 1 at perfect balance, N/K where all tokens pick the same K experts with
        certainty.
    """
    losses = []
    for logits in router_logits:
        tokens, experts = logits.shape
        # What does not count goes to a row of its own, behind the last.
        rows = logits.new_zeros(tokens, dtype=torch.long) if ids is None else ids.to(logits.device) % (count + 1)
        scores = logits.float().sigmoid() if score_func == "sigmoid" else logits.float().softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        picks = torch.zeros_like(scores).scatter_(1, logits.detach().topk(top_k).indices, 1.0)
        zeros = scores.new_zeros(count + 1, experts)
        size = scores.new_zeros(count + 1).index_add(0, rows, scores.new_ones(tokens))[:count]
        picked, scored = zeros.index_add(0, rows, picks)[:count], zeros.index_add(0, rows, scores)[:count]
        products = experts / top_k * (picked * scored).sum(-1) / size.clamp(min=1) ** 2
        losses.append((products.sum() / (size > 0).sum().clamp(min=1)).to(router_logits[0].device))
    return torch.stack(losses).mean()


def z_loss(router_logits: Sequence[Tensor], tokens: Tensor | None = None) -> Tensor:
    """
    Returns the mean of logsumexp(z)² over tokens and layers, which keeps logits small
    (https://huggingface.co/papers/2202.08906).

    Args:
        router_logits (`Sequence[torch.Tensor]`):
            Of each layer, `(T, N)`.
        tokens (`torch.Tensor` of shape `(T,)`, *optional*):
            True at the tokens that count.
    """
    device, losses = router_logits[0].device, []
    for logits in router_logits:
        squares = logits.float().logsumexp(-1).square()
        weights = torch.ones_like(squares) if tokens is None else tokens.to(squares)
        losses.append(((squares * weights).sum() / weights.sum().clamp(min=1)).to(device))
    return torch.stack(losses).mean()
