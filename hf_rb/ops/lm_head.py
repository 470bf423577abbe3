"""The one loop over tiles of (hidden states, LM head): losses on next-token distributions without the logits of all
tokens.

A language model's logits are hidden states times the LM head, `(N, H) @ (V, H).T`; for 4,096 tokens and a vocabulary
of 152,000 one such tensor takes 2.5 GB, and a divergence between two models keeps six or more. Here a tile of rows at
a time is projected, handed to a *rule* that returns every token's loss with its derivative by the log-probabilities,
and turned at once into the gradients of the hidden states and of the head. The gradients are therefore ready when the
forward pass ends; the backward pass only scales them. Every product is made once, as in the dense computation, and
what is kept has the size of the inputs.

    z = h W.T + b          logits of a tile, in the buffer that then takes their gradient
    c = ∂loss/∂(log q)     from the rule
    ∂loss/∂z = c - q Σc

Shapes: N tokens (only those with a label), V vocabulary, H hidden size; the teacher's hidden size may differ.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_rb.objectives.token_rule import Term, TokenRule


__all__ = ["TILE_BYTES", "CachedLogits", "Head", "Scored", "TeacherLogits", "lm_head_loss", "logit_blocks", "project"]

# Bytes of one tile of logits, with a frozen and with a trained head: larger tiles make fewer passes over the head's
# gradient.
TILE_BYTES = {"cpu": (12 << 20, 24 << 20), "cuda": (256 << 20, 256 << 20)}
# The elementwise work on a tile goes through it in blocks that stay in a CPU's cache.
BLOCK_BYTES = 4 << 20
# A head in half precision is widened by slabs of this many rows where there is no matrix product with float32 results.
SLAB_ROWS = 8192


@dataclass(frozen=True)
class Head:
    """An LM head: logits = softcap(scale · (hidden @ weight.T + bias)).

    Args:
        weight (`torch.Tensor` of shape `(V, H)`, *optional*):
            Weight. `None` says that the hidden states are the logits already, of shape `(N, V)`.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias.
        scale (`float`, *optional*, defaults to `1.0`):
            What the model multiplies its logits by (Cohere, Granite).
        softcap (`float`, *optional*):
            Bound of the logits, `softcap · tanh(logits / softcap)` (Gemma).
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def device(self) -> torch.device | None:
        """Device that hidden states must be on, `None` for any."""
        return None if self.weight is None else self.weight.device

    def width(self, hidden: torch.Tensor) -> int:
        """Returns the number of logits V of hidden states."""
        return hidden.shape[-1] if self.weight is None else self.weight.shape[0]


@dataclass(frozen=True)
class TeacherLogits:
    """One model's part in the teacher's logits, which are the sum of `factor · logits` over all parts.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Last hidden states at the student's tokens; the hidden size is the teacher's own.
        head ([`Head`]):
            The teacher's LM head. Rows beyond the student's vocabulary are ignored.
        factor (`float`, *optional*, defaults to `1.0`):
            Weight of this model's logits in a mixture.
    """

    hidden: torch.Tensor
    head: Head
    factor: float = 1.0


@dataclass(frozen=True)
class CachedLogits:
    """A teacher known on m ids a token. The rest of the vocabulary is one event.

    Args:
        ids (`torch.Tensor` of shape `(N, m)`):
            Distinct token ids.
        log_probs (`torch.Tensor` of shape `(N, m)`):
            Their log-probabilities.
        rest (`torch.Tensor` of shape `(N,)`):
            Log-probability of all other ids together. Not read when there are none.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor


class Scored(NamedTuple):
    """Result of [`lm_head_loss`].

    Attributes:
        loss (`torch.Tensor`):
            Scalar Σ weights · loss, differentiable.
        stats (`dict[str, torch.Tensor]`):
            `"loss"` and what the rule reports, each of shape `(N,)`, detached.
    """

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


def lm_head_loss(
    hidden: torch.Tensor,
    head: Head,
    rule: TokenRule,
    tokens: dict[str, torch.Tensor],
    teacher: list[TeacherLogits] | CachedLogits | None = None,
    weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    tile_rows: int | None = None,
) -> Scored:
    """
    Sum of a per-token loss on next-token distributions, without keeping anything of shape tokens times vocabulary.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            The student's last hidden states, one row a token that is trained on. N may be 0: the loss is 0.
        head ([`Head`]):
            The student's LM head. Its weight and bias get gradients if they require them.
        rule ([`~hf_rb.objectives.token_rule.TokenRule`]):
            The loss.
        tokens (`dict[str, torch.Tensor]`):
            What the rule needs about each token (labels, uniforms, scores), each with N rows.
        teacher (`list[TeacherLogits]` or `CachedLogits`, *optional*):
            Where `log_p` comes from. Never gets a gradient.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Factor of every token in the sum; 1 when not given.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides all logits.
        vocabulary (`int`, *optional*):
            Number of leading ids that take part, when the models pad their vocabularies differently.
        tile_rows (`int`, *optional*):
            Rows of a tile; chosen by memory when not given. The result does not depend on it beyond rounding.

    Returns:
        [`Scored`]: The loss, and every token's statistics.
    """
    stats: dict[str, torch.Tensor] = {}
    vocabulary = vocabulary or head.width(hidden)
    weights = hidden.new_ones(len(hidden), dtype=torch.float32) if weights is None else weights.detach().float()

    def run(
        hidden_grad: torch.Tensor | None, weight_grad: torch.Tensor | None, bias_grad: torch.Tensor | None
    ) -> torch.Tensor:
        wanted = hidden_grad is not None or weight_grad is not None
        losses = _loop(
            hidden.detach(), head, rule, tokens, teacher, weights, temperature, vocabulary, tile_rows, wanted,
            hidden_grad, weight_grad, bias_grad, stats,
        )  # fmt: skip
        return losses

    parts = (hidden, head.weight, head.bias)
    if not torch.is_grad_enabled():  # a function's forward pass is asked for gradients all the same
        parts = tuple(part if part is None else part.detach() for part in parts)
    return Scored(_TiledLoss.apply(*parts, run), stats)


class _TiledLoss(torch.autograd.Function):
    """Runs the loop in the forward pass and keeps the gradients for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        run: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        needs = ctx.needs_input_grad[:3]
        ctx.kinds = [(tensor.dtype if tensor is not None else None) for tensor in (hidden, weight, bias)]
        ctx.grads = [
            None
            if tensor is None or not need
            else torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
            for tensor, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        with torch.autocast(hidden.device.type, enabled=False):
            return run(*ctx.grads)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        if ctx.grads is None:
            raise RuntimeError("This loss can be differentiated once; call it again for another backward pass.")
        # Scaled in place: the buffers are ours, and the head's can be the largest tensor of the step.
        grads = [
            grad if grad is None else grad.mul_(grad_output).to(kind)
            for grad, kind in zip(ctx.grads, ctx.kinds, strict=True)
        ]
        ctx.grads = None
        return (*grads, None)


def _loop(
    hidden: torch.Tensor,
    head: Head,
    rule: TokenRule,
    tokens: dict[str, torch.Tensor],
    teacher: list[TeacherLogits] | CachedLogits | None,
    weights: torch.Tensor,
    temperature: float,
    vocabulary: int,
    tile_rows: int | None,
    wanted: bool,
    hidden_grad: torch.Tensor | None,
    weight_grad: torch.Tensor | None,
    bias_grad: torch.Tensor | None,
    stats: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Returns Σ weights · loss, fills `stats`, and adds to the gradients that are given, if any is `wanted`."""
    rows, block_rows = _sizes(hidden.device.type, vocabulary, tile_rows, trains_head=weight_grad is not None)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for tile in _slices(len(hidden), rows):
        logits = project(hidden[tile], head, temperature, vocabulary)
        teacher_logits = _teacher_logits(teacher, tile, temperature, vocabulary)
        for block in _slices(len(logits), block_rows):
            rows_of = slice(tile.start + block.start, tile.start + block.stop)
            here = {name: tensor[rows_of] for name, tensor in tokens.items()}
            log_probs = torch.log_softmax(logits[block], dim=-1)
            events = _events(log_probs, teacher, teacher_logits, rows_of, block)
            if events.ids is not None:
                here["rest"] = events.log_p[:, -1]
            term = rule(events.log_q, events.log_p, log_probs, here)
            total += (term.loss * weights[rows_of]).sum()
            for name, value in {"loss": term.loss, **term.stats}.items():
                # Allocated once: small tensors left between the blocks' large ones would keep freed memory from being
                # reused.
                if name not in stats:
                    stats[name] = total.new_empty(len(hidden))
                stats[name][rows_of] = value
            if wanted:
                _write_gradient(logits[block], log_probs, events, term, weights[rows_of], head, temperature)
        if hidden_grad is not None:
            _add_hidden_gradient(hidden_grad[tile], logits, head, vocabulary)
        if weight_grad is not None:
            weight_grad[:vocabulary].addmm_(logits.T, hidden[tile].float())
        if bias_grad is not None:
            bias_grad[:vocabulary] += logits.sum(0)
        del logits, teacher_logits  # before the next tile is made
    return total


class _Events(NamedTuple):
    log_q: torch.Tensor
    log_p: Any
    ids: torch.Tensor | None = None


def _events(
    log_probs: torch.Tensor,
    teacher: list[TeacherLogits] | CachedLogits | None,
    teacher_logits: torch.Tensor | None,
    rows_of: slice,
    block: slice,
) -> _Events:
    """Puts student and teacher on the same events: the vocabulary, or a cached teacher's ids and the rest as one
    event.
    """
    if not isinstance(teacher, CachedLogits):
        log_p = None if teacher_logits is None else torch.log_softmax(teacher_logits[block], dim=-1)
        return _Events(log_probs, log_p)
    ids, log_p = teacher.ids[rows_of].long(), teacher.log_probs[rows_of].float()
    # The rest is known by itself on both sides: 1 minus the known would lose all digits, or fall to 0, when it is
    # small.
    rest_q = log_probs.exp().scatter_(-1, ids, 0).sum(-1, keepdim=True).log()
    rest_p = teacher.rest[rows_of].float().unsqueeze(-1)
    if ids.shape[-1] == log_probs.shape[-1]:
        rest_p = torch.full_like(rest_p, -torch.inf)
    return _Events(torch.cat([log_probs.gather(-1, ids), rest_q], -1), torch.cat([log_p, rest_p], -1), ids)


def _write_gradient(
    logits: torch.Tensor,
    log_probs: torch.Tensor,
    events: _Events,
    term: Term,
    weights: torch.Tensor,
    head: Head,
    temperature: float,
) -> None:
    """Replaces a block of logits by ∂loss/∂(hidden @ weight.T + bias)."""
    dense: Any = term.dense  # which a rule always gives over the events of a cache
    slope = None if head.softcap is None else 1 - (logits * (temperature / head.softcap)).square()
    total = term.loss.new_zeros(len(logits), 1)
    if dense is not None:
        total = total + dense.sum(-1, keepdim=True)
    if term.values is not None:
        total = total + term.values.sum(-1, keepdim=True)
    torch.exp(log_probs, out=logits)
    if events.ids is None:
        logits.mul_(-total)
        if dense is not None:
            logits.add_(dense)
    else:
        # The rest's derivative is shared out in proportion to q.
        q_known, rest_q = logits.gather(-1, events.ids), events.log_q[:, -1:].exp()
        shared = torch.where(rest_q > 0, dense[:, -1:] / rest_q, 0)
        logits.mul_(shared - total).scatter_(-1, events.ids, dense[:, :-1] - q_known * total)
    if term.picks is not None and term.values is not None:
        logits.scatter_add_(-1, term.picks, term.values)
    logits.mul_(weights.unsqueeze(-1) * (head.scale / temperature))
    if slope is not None:
        logits.mul_(slope)


def logit_blocks(
    hidden: torch.Tensor, head: Head, temperature: float, vocabulary: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields all logits in float32, a block of rows at a time, without gradient."""
    tile_rows, block_rows = _sizes(hidden.device.type, vocabulary, None)
    for tile in _slices(len(hidden), tile_rows):
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            logits = project(hidden[tile], head, temperature, vocabulary)
        for block in _slices(len(logits), block_rows):
            yield slice(tile.start + block.start, tile.start + block.stop), logits[block]


def _sizes(device: str, vocabulary: int, tile_rows: int | None = None, trains_head: bool = False) -> tuple[int, int]:
    """Rows of a tile and of a block."""
    budget = TILE_BYTES.get(device, TILE_BYTES["cuda"])[trains_head]
    rows = tile_rows or max(1, budget // (4 * vocabulary))
    return rows, max(1, BLOCK_BYTES // (4 * vocabulary)) if device == "cpu" else rows


def _slices(length: int, step: int) -> Iterator[slice]:
    # Nothing is one empty slice, so that no tokens have the same statistics, empty, as some.
    for start in range(0, max(length, 1), step):
        yield slice(start, min(start + step, length))


def _teacher_logits(
    teacher: list[TeacherLogits] | CachedLogits | None, tile: slice, temperature: float, vocabulary: int
) -> torch.Tensor | None:
    if teacher is None or isinstance(teacher, CachedLogits):
        return None
    first, *others = teacher
    logits = project(first.hidden[tile], first.head, temperature / first.factor, vocabulary)
    for part in others:
        logits += project(part.hidden[tile], part.head, temperature / part.factor, vocabulary)
    return logits


def project(hidden: torch.Tensor, head: Head, temperature: float, vocabulary: int) -> torch.Tensor:
    """Returns float32 logits `(rows, vocabulary)` divided by the temperature."""
    if head.weight is None:  # a copy, as the result is written into
        return hidden[:, :vocabulary].to(torch.float32, copy=True).div_(temperature)
    weight = head.weight.detach()[:vocabulary]
    if weight.dtype == torch.float32:
        logits = hidden.float() @ weight.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    else:
        wide = hidden.float()
        logits = torch.empty(len(hidden), vocabulary, dtype=torch.float32, device=hidden.device)
        for slab in _slices(vocabulary, SLAB_ROWS):
            torch.mm(wide, weight[slab].float().T, out=logits[:, slab])
    if head.bias is not None:
        logits += head.bias.detach()[:vocabulary]
    if head.scale != 1 and head.softcap is None:
        temperature = temperature / head.scale
    elif head.softcap is not None:
        logits.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap)
    return logits if temperature == 1 else logits.div_(temperature)


def _add_hidden_gradient(grad: torch.Tensor, logits: torch.Tensor, head: Head, vocabulary: int) -> None:
    if head.weight is None:
        grad[:, :vocabulary] += logits
        return
    weight = head.weight.detach()[:vocabulary]
    if weight.dtype == torch.float32:
        grad.addmm_(logits, weight)
    elif grad.is_cuda:
        grad += torch.mm(logits.to(weight.dtype), weight, out_dtype=torch.float32)
    else:
        for slab in _slices(vocabulary, SLAB_ROWS):
            grad.addmm_(logits[:, slab], weight[slab].float())
