r"""Rotation of the hidden state: outliers are spread over channels, and the model computes what it did before.

With R orthogonal, a block diagonal of equal randomised Hadamard matrices, and the gain of every RMSNorm moved into
what reads it,

    embeddings <- E R,    what reads the hidden state <- W R,    what writes to it <- R' W (and R' b),    head <- W R

leaves every logit as it is, since rms(x R) = rms(x). Nothing is left to do at run time: the model is of its
architecture, with norms of gain 1. Its input and output embeddings can no longer be tied.

From https://huggingface.co/papers/2404.00456, as https://huggingface.co/papers/2602.02546 uses it. What its released
code does besides, taking the mean of the embeddings away, would change a model with RMSNorms.

A model is only rotated if all of its parameters are known to be one of these parts: pre-norm decoders in the manner of
Llama, without experts.
"""

import copy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


__all__ = ["check", "fuse_and_rotate", "fuse_norms", "hadamard", "resolve_block", "untie"]

WIDEST_BLOCK = 128
# In every decoder layer, the norm before and the module that holds what reads it and what writes to the hidden state.
BRANCHES = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
WRITERS = ("o_proj", "down_proj")
HEAD_NORMS = ("q_norm", "k_norm")  # of queries and keys: behind the projections, where nothing is rotated


class _Parts(NamedTuple):
    embeddings: nn.Embedding
    norms: list[tuple[Any, list[nn.Linear]]]  # modules with a weight, and what reads them
    writers: list[nn.Linear]


@torch.no_grad()
def fuse_and_rotate(model: PreTrainedModel, block: int | str = "auto", seed: int = 0) -> int:
    """
    Rotates a model in place; it unties the embeddings and moves the gains of norms into what reads them first.

    Args:
        model (`transformers.PreTrainedModel`):
            A dense decoder with RMSNorms before attention and MLP. All of its weights are in memory.
        block (`int` or `str`, *optional*, defaults to `"auto"`):
            Width of a Hadamard matrix, a power of two that divides the hidden size. `"auto"` is the largest up to 128.
        seed (`int`, *optional*, defaults to `0`):
            Of the random signs.

    Returns:
        `int`: The width that was used.

    Raises:
        ValueError: The model has another structure, or the width does not divide the hidden size.
    """
    parts = _parts(model)
    block = resolve_block(model.config.get_text_config().hidden_size, block)
    untie(model)
    fuse_norms(model)
    matrix = hadamard(block, seed)
    for module in (parts.embeddings, *(reader for _, readers in parts.norms for reader in readers)):
        _set(module.weight, _rotate(module.weight, matrix))
    for writer in parts.writers:
        _set(writer.weight, _rotate(writer.weight.T, matrix).T)
        if writer.bias is not None:
            _set(writer.bias, _rotate(writer.bias, matrix))
    return block


def check(model: PreTrainedModel, block: int | str = "auto") -> None:
    """
    Raises the `ValueError` of [`fuse_and_rotate`] for a model that cannot be rotated. Its weights may be on the meta
    device.
    """
    _parts(model)
    resolve_block(model.config.get_text_config().hidden_size, block)


@torch.no_grad()
def fuse_norms(model: PreTrainedModel) -> None:
    """
    Moves the gains of norms into what reads them, in place. Embeddings have to be untied.

    Raises:
        ValueError: The model has a structure that is not known.
    """
    for norm, readers in _parts(model).norms:
        for reader in readers:
            _set(reader.weight, reader.weight.to(_wide(reader.weight)) * norm.weight)
        norm.weight.fill_(1)


@torch.no_grad()
def untie(model: PreTrainedModel) -> None:
    """Gives the head a weight of its own, in place, and says so in the model's configuration."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(embeddings.weight.clone(), embeddings.weight.requires_grad)
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


def resolve_block(hidden_size: int, block: int | str = "auto") -> int:
    """
    Returns the width of a Hadamard matrix.

    Raises:
        ValueError: `block` is no power of two, or does not divide the hidden size.
    """
    largest = hidden_size & -hidden_size
    if block == "auto":
        return min(WIDEST_BLOCK, largest)
    width = cast(int, block)
    if width < 1 or width & (width - 1) or largest % width:
        raise ValueError(
            f"`rotation_block` must be a power of two that divides the hidden size {hidden_size}, so at most "
            f"{largest}, or 'auto'; got {block!r}."
        )
    return width


def hadamard(width: int, seed: int = 0) -> Tensor:
    """Returns an orthogonal Hadamard matrix with random signs of its rows, float64 `(width, width)`; a power of
    two.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = 2 * torch.randint(2, (width, 1), generator=torch.Generator().manual_seed(seed)) - 1
    return matrix * signs / width**0.5


def _rotate(weight: Tensor, matrix: Tensor) -> Tensor:
    weight = weight.to(_wide(weight))
    return (weight.unflatten(-1, (-1, len(matrix))) @ matrix.to(weight)).flatten(-2)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _parts(model: PreTrainedModel) -> _Parts:
    """Returns the parts of a model, or raises a `ValueError` that names what it does not know."""
    decoder: Any = model.get_decoder()
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    norms, writers, head_norms = [], [], []
    if head is None:
        raise ValueError(_unknown(model, "it has no head that could undo the rotation"))
    try:
        for layer in decoder.layers:
            for norm, branch in BRANCHES:
                linear = {
                    name: part for name, part in getattr(layer, branch).named_modules() if type(part) is nn.Linear
                }
                norms.append((getattr(layer, norm), [part for name, part in linear.items() if name not in WRITERS]))
                writers += [part for name, part in linear.items() if name in WRITERS]
            head_norms += [norm for name in HEAD_NORMS if (norm := getattr(layer.self_attn, name, None)) is not None]
        norms.append((decoder.norm, [head]))
    except AttributeError as error:
        raise ValueError(_unknown(model, f"{type(error.obj).__name__} has no {error.name}")) from error
    known = [embeddings, *writers, *head_norms, *(part for norm, readers in norms for part in (norm, *readers))]
    known = {id(parameter) for part in known for parameter in part.parameters()}
    if others := [name for name, parameter in model.named_parameters() if id(parameter) not in known]:
        raise ValueError(_unknown(model, f"it has {', '.join(others[:3])}{' …' if len(others) > 3 else ''}"))
    hidden = embeddings.embedding_dim
    misfits = [part for _, readers in norms for part in readers if part.in_features != hidden]
    misfits += [part for part in writers if part.out_features != hidden]
    if misfits or len(writers) != 2 * len(decoder.layers):
        raise ValueError(_unknown(model, f"not all of its projections read or write the {hidden} channels"))
    for norm, _ in norms:
        if not _is_rms_norm(norm, hidden):
            raise ValueError(_unknown(model, f"{type(norm).__name__} is no RMSNorm that multiplies by its weight"))
    return _Parts(embeddings, norms, writers)


def _is_rms_norm(norm: nn.Module, hidden: int) -> bool:
    weight = getattr(norm, "weight", None)
    epsilon: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or epsilon is None or sum(1 for _ in norm.parameters()) != 1:
        return False
    # On the CPU with weights of its own: those of the model may not be there yet, or be such that kinds of norms
    # agree.
    draws = torch.Generator().manual_seed(0)
    trial: Any = copy.copy(norm)
    options = dict(
        generator=draws, dtype=torch.float32, device="cpu"
    )  # while a model is made, the defaults are its own
    gain, inputs = torch.randn(hidden, **options), torch.randn(4, hidden, **options)
    inputs[0] += 1  # a mean that a LayerNorm would take away
    trial._parameters = {"weight": gain}
    expected = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + epsilon) * gain
    with torch.no_grad():
        found = trial(inputs)
    return torch.allclose(found.float(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def _unknown(model: PreTrainedModel, reason: str) -> str:
    return (
        f"`rotate` knows decoders in the manner of Llama, without experts; {type(model).__name__} is none: {reason}. "
        "Use `rotate=False` (`--no-rotate`)."
    )
