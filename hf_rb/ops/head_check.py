"""Checks on 8 tokens that a model's logits are what the tile loop takes them for: last hidden states through
[`Head`].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_rb.ops.backbone import gathered_head, head_of, undisturbed, width_of, without_peft
from hf_rb.ops.lm_head import Head
from hf_rb.ops.lm_head_queries import lm_head_logits
from hf_rb.ops.rounding import coarsest_eps, smallest_max


__all__ = ["head_difference", "why_not_head"]

# Magnitudes of the logits that are compared, a token each. A cap is seen at large ones only, a missing bias at small
# ones.
MAGNITUDES = (1.0, 30.0, 300.0, 1.0, 30.0, 300.0, 1.0, 30.0)
# Roundings between hidden states and logits: of their product, the bias, the scale, and a cap's quotient, tanh and
# product; under autocast of both factors besides. Each is at most one unit of the coarsest type involved.
ROUNDINGS = 8
# float32 products may be made in TF32, which keeps 11 bits.
SMALLEST_UNIT = 2.0**-11


def why_not_head(model: PreTrainedModel) -> str | None:
    """
    Returns why a model's logits are not its last hidden states through its LM head, `None` if they are.

    Costs one forward pass of 8 tokens. It runs in evaluation mode and without gradient; random states, modes and
    buffers are as before. Under FSDP or DeepSpeed, call this inside the wrapper's forward, on all processes.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Unwrapped model.
    """
    layer = model.get_output_embeddings()
    if getattr(layer, "weight", None) is None:
        return (
            f"its output layer, {type(layer).__name__}, has no weight"
            if layer is not None
            else "it has no output layer"
        )
    try:
        others = _other_trained(model)
        if others and (others := _reaching(model, others)):
            more = f" and {len(others) - 1} more of its parameters" if len(others) > 1 else ""
            return f"`{others[0]}`{more} would get no gradient"
        difference, tolerance = head_difference(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a class that nobody has tried: a reason, like any other
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return f"on {len(MAGNITUDES)} tokens, {kind}{str(error).strip().partition(chr(10))[0]}"
    return None if difference <= tolerance else f"the two differ by {difference:.0%}"


def head_difference(model: PreTrainedModel) -> tuple[float, float]:
    """
    Compares a model's own head with ours on the same random hidden states, which stand in for its backbone's.

    Real hidden states would not do: those of an untrained model give logits so small that a cap does not show.

    Returns:
        `tuple[float, float]`: Root mean square of the difference of the logits of a token, relative to that of the
        logits, the largest of all tokens; and how much of that rounding explains.

    Raises:
        Exception: Whatever stands in the way, such as a class that returns no last hidden states.
    """
    with undisturbed(model):
        with gathered_head(model):
            head = head_of(model)
            hidden = _hidden(head, model.dtype)
            ours = lm_head_logits(hidden, head)
        logits, types = _logits(model, hidden)
        if logits.shape != (1, *ours.shape):
            raise ValueError(
                f"its logits have the shape {tuple(logits.shape)}, and those of the head {(1, *ours.shape)}"
            )
        stored = head.weight.dtype if head.weight is not None else hidden.dtype
        unit = max(SMALLEST_UNIT, coarsest_eps(hidden.device, stored, *types, logits.dtype) / 2)
        theirs = logits[0].to(ours.device, torch.float32)
        difference = ((theirs - ours).norm(dim=-1) / ours.norm(dim=-1)).max().item()
    return difference if difference == difference else torch.inf, ROUNDINGS * unit


def _hidden(head: Head, dtype: torch.dtype) -> torch.Tensor:
    """
    Random hidden states `(8, H)` that give logits of the magnitudes above, exact in bfloat16 and so in every wider
    type. In float16 they give smaller ones where they, or the logits before a small scale, would not be finite.
    """
    weight: Any = head.weight
    if not weight.is_floating_point() or weight.ndim != 2:
        raise ValueError(f"the weight of the LM head is packed ({weight.dtype}, {tuple(weight.shape)})")
    width = weight.shape[1]
    hidden = torch.randn(len(MAGNITUDES), width, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(weight.device)
    logits = lm_head_logits(hidden, Head(weight))
    size = (logits * head.scale).square().mean(-1, keepdim=True).sqrt()
    if not (size > 0).all():
        raise ValueError("the LM head is zero")
    factor = torch.tensor(MAGNITUDES, device=size.device).unsqueeze(-1) / size
    largest = torch.maximum(hidden.abs().amax(-1, keepdim=True), logits.abs().amax(-1, keepdim=True))
    fits = smallest_max(hidden.device, weight.dtype, dtype) / 4 / largest
    return (hidden * torch.minimum(factor, fits)).bfloat16()


def _tokens(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Ids that stand for no image, sound or padding."""
    configs = (model.config, model.config.get_text_config())
    special = {
        value
        for config in configs
        for key, value in vars(config).items()
        if key.endswith(("_token_id", "_token_index"))
        if isinstance(value, int)
    }
    usual = [number for number in range(min(width_of(model), 1000)) if number not in special] or [0]
    ids = torch.tensor([[usual[place % len(usual)] for place in range(len(MAGNITUDES))]])
    embeddings: Any = model.get_input_embeddings()
    ids = ids.to(embeddings.weight.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> tuple[torch.Tensor, list[torch.dtype]]:
    """Returns the logits that a model's own head makes of hidden states `(8, H)`, and the types that it computes
    in.
    """
    backbone: Any = without_peft(model).base_model
    inputs: dict[str, Any] = _tokens(model) | {"use_cache": False}
    with _giving(backbone, hidden) as types:
        logits = model.forward(**inputs).logits
    if types:
        return logits, types
    # OPT and Bart's kin run a part of the backbone. Then that part must be all that the backbone does to its last
    # hidden states.
    with _giving(backbone.get_decoder(), hidden) as types:
        logits = model.forward(**inputs).logits
        if not types or not torch.equal(backbone(**inputs).last_hidden_state[0], hidden.to(types[0])):
            raise ValueError(f"its forward does not call its backbone, which is taken to be {type(backbone).__name__}")
    return logits, types


@contextmanager
def _giving(module: torch.nn.Module, hidden: torch.Tensor) -> Iterator[list[torch.dtype]]:
    """Context in which a module gives certain last hidden states. Yields a list to which the type is added that they
    go on in.
    """
    types: list[torch.dtype] = []

    def replace(module: torch.nn.Module, args: Any, output: Any) -> Any:
        states = output.last_hidden_state
        if states.shape != (1, *hidden.shape):
            raise ValueError(
                f"its hidden states have the shape {tuple(states.shape)}, and its LM head reads {(1, *hidden.shape)}"
            )
        types.append(states.dtype)
        output.last_hidden_state = hidden.unsqueeze(0).to(states)
        return output

    handle = module.register_forward_hook(replace)
    try:
        yield types
    finally:
        handle.remove()


def _reaching(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Returns those of the parameters that the logits depend on: an auxiliary head gets no gradient from the model's
    own either.
    """
    parameters = dict(without_peft(model).named_parameters(remove_duplicate=False))
    with undisturbed(model), torch.enable_grad():
        logits = model.forward(**_tokens(model), use_cache=False).logits
        gradients = torch.autograd.grad(logits.float().sum(), [parameters[name] for name in names], allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]


def _other_trained(model: PreTrainedModel) -> list[str]:
    """
    Names of the trained parameters behind the backbone that are not the head's weight and bias. One that starts at
    zero, such as LoRA's second factor, changes no logit yet.
    """
    model = without_peft(model)
    layer: Any = model.get_output_embeddings()
    head = {id(layer.weight), id(getattr(layer, "bias", None))}
    backbone = {id(parameter) for parameter in model.base_model.parameters()}
    inside = {id(parameter) for parameter in layer.parameters()}
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
        and id(parameter) not in head
        and (id(parameter) in inside or id(parameter) not in backbone)
    ]
