"""Hidden-Align in a GRPO trainer: where the anchors are, what they are aligned with, and the loss of a micro-batch."""

from bisect import bisect_right
from typing import Any, cast

import torch

from hf_rb.advantages import ShapingContext
from hf_rb.objectives.hidden_align import alignment_targets, cross_group_cosine, target_loss
from hf_rb.ops.backbone import recorded_hidden
from hf_rb.rl.rewards import MARKERS


__all__ = ["add_targets", "anchor_of", "auxiliary_loss"]


def anchor_of(tokenizer: Any, ids: list[int], mask: list[bool], marker: str) -> int | None:
    """
    Returns where the hidden state of a rollout is taken: at the last token that ends at or before the last marker.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer.
        ids (`list[int]` of length L):
            Token ids of the completion.
        mask (`list[bool]` of length at least L):
            Which tokens the model wrote. Only its last turn counts.
        marker (`str`):
            Text with which the answer begins.

    Returns:
        `int` or `None`: Index in `ids`; `None` without a marker, or with nothing before it in the turn.
    """
    mask = mask[: len(ids)]
    stop = max((index + 1 for index, written in enumerate(mask) if written), default=0)
    start = max((index + 1 for index, written in enumerate(mask[:stop]) if not written), default=0)
    turn = ids[start:stop]
    text = tokenizer.decode(turn)
    position = text.rfind(marker)
    if position < 0:
        return None
    count = bisect_right(range(len(turn) + 1), position, key=lambda length: len(tokenizer.decode(turn[:length]))) - 1
    # Half of a character decodes to another one, which can be longer.
    while count > 0 and not text[:position].startswith(tokenizer.decode(turn[:count])):
        count -= 1
    return start + count - 1 if count > 0 else None


@torch.no_grad()
def add_targets(trainer: Any, output: dict[str, Any], context: ShapingContext) -> None:
    """
    Adds to a generation batch where each rollout's anchor is, the direction that it is aligned with and its weight.
    Takes one forward pass without gradient. Every process must call it.

    Args:
        trainer ([`GRPOTrainer`]):
            The trainer.
        output (`dict`):
            The generation batch.
        context ([`~hf_rb.advantages.ShapingContext`]):
            The generation.
    """
    args, device = trainer.args, trainer.accelerator.device
    correct, wrong = (cast(torch.Tensor, one) for one in (context.correct, context.wrong))  # the config asks for them
    marker = args.hidden_align_marker or MARKERS[args.answer_extractor]
    anchors = [
        anchor_of(trainer._tokenizer, ids, mask, marker) if is_correct else None
        for ids, mask, is_correct in zip(
            context.completion_ids, context.mask.tolist(), correct[context.local].tolist(), strict=True
        )
    ]
    found = torch.tensor([anchor is not None for anchor in anchors], device=device)
    positions = output["prompt_ids"].shape[1] + torch.tensor([anchor or 0 for anchor in anchors], device=device)
    states = trainer.accelerator.gather(_states(trainer, output, positions))
    found = trainer.accelerator.gather(found)

    group_size = context.group_size
    aligned = found
    if not args.hidden_align_all_correct:
        wrong = wrong.view(-1, group_size).any(1).repeat_interleave(group_size)
        aligned = found & wrong.to(device)
    targets, weights = alignment_targets(states, aligned, group_size)
    output |= {
        "align_position": positions,
        "align_target": targets[context.local],
        "align_weight": weights[context.local],
    }
    metrics = {
        "aligned": (weights > 0).float().mean(),
        "cosine": 1 - target_loss(states, targets, weights) if weights.any() else torch.tensor(torch.nan),
        "cosine_across": cross_group_cosine(states, weights > 0, group_size),
    }
    logged = trainer._metrics["train" if context.training else "eval"]
    for name, value in metrics.items():
        if value.isfinite():
            logged[f"hidden_align/{name}"].append(value.item())


def _states(trainer: Any, output: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, H) at one position of each row, by the policy as it is."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    size = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
    chosen = []
    for rows in torch.arange(len(ids), device=ids.device).split(size):
        with recorded_hidden(model) as states:
            trainer._get_per_token_logps_and_entropies(trainer.model, ids[rows], mask[rows], logits_to_keep=1)
        chosen.append(_at(states[0], positions[rows]).to(ids.device))
    return torch.cat(chosen)


def _at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One position of each row, (B, H) in float32. With the model split by `device_map`, the two may be on different
    devices.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, positions.to(hidden.device)].float()


def auxiliary_loss(trainer: Any, inputs: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    """
    Returns what a micro-batch adds to TRL's loss. Processes average their losses, and the micro-batches of a step add
    theirs up; over a generation the terms add up to the loss of each of its optimizer steps, however it is split.

    Args:
        trainer ([`GRPOTrainer`]):
            The trainer.
        inputs (`dict`):
            The micro-batch.
        hidden (`torch.Tensor` of shape `(B, L, H)`):
            Last hidden states of its forward pass.
    """
    states = _at(hidden, inputs["align_position"]).to(inputs["align_target"].device)
    scale = trainer.args.hidden_align_coef * trainer.accelerator.num_processes
    if trainer.model.training:
        scale *= trainer.args.steps_per_generation / trainer.current_gradient_accumulation_steps
    return scale * target_loss(states, inputs["align_target"], inputs["align_weight"])
