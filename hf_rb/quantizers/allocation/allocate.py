"""Settings of layers by their sensitivity: `bits_per_layer="nsds:3.0"` becomes one for each of them before anything is
loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rb.io.safetensors import Entry, read_header
from hf_rb.methods import QuantizerMethod
from hf_rb.quantizers.allocation import nsds
from hf_rb.quantizers.packed.report import LayerAllocation
from hf_rb.quantizers.rules import nsds_budget
from hf_rb.utils.progress import tqdm


__all__ = ["allocate_layers"]

PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def allocate_layers(
    method: QuantizerMethod, strategy: str, model: PreTrainedModel, files: Sequence[str | Path] | None
) -> list[LayerAllocation]:
    """
    Scores the decoder layers of a checkpoint by NSDS and says what each of them gets.

    Args:
        method ([`~hf_rb.methods.QuantizerMethod`]):
            Says what the least and the most sensitive layers get: 2 or 4 bits, as in the paper, 2 or 3 planes.
        strategy (`str`):
            `"nsds:"` and the average over layers.
        model (`transformers.PreTrainedModel`):
            The model, on the meta device.
        files (`Sequence[str | Path]`, *optional*):
            Its safetensors files. The weights of one layer are in memory at a time.

    Raises:
        ValueError: The strategy is no such text; the weights are in no safetensors files; or the layers are not those
            of a dense decoder in the manner of Llama with an LM head.
    """
    per_layer, budget = method.per_layer, nsds_budget(strategy)
    if budget is None or method.nsds is None:
        raise ValueError(
            f"`{per_layer}` as text must be 'nsds:' and an average, such as 'nsds:2.5'; got {strategy!r}."
        )
    layers, wanted = _decoder_layers(model), {}
    if not layers or model.get_output_embeddings() is None:
        lacks = "list of decoder layers called `layers`" if not layers else "LM head"
        raise ValueError(
            f"`{per_layer}={strategy!r}` compares the layers of a decoder in the manner of Llama by its LM head, and "
            f"{type(model).__name__} has no {lacks}. Name layers yourself: `{per_layer}={{'NAME': "
            f"{method.nsds[1]}}}`, with the end of a layer's name."
        )
    for name, layer in layers.items():
        for role, projection in PROJECTIONS.items():
            if not isinstance(_find(layer, projection), nn.Linear):
                if role == "gate":
                    continue
                raise ValueError(
                    f"`{per_layer}={strategy!r}` compares the "
                    f"{', '.join(path.rpartition('.')[2] for path in PROJECTIONS.values())} of layers; {name} of "
                    f"{type(model).__name__} has no {projection}. Name the layers yourself: `{per_layer}={{{name!r}: "
                    f"{method.nsds[1]}}}`."
                )
            wanted[name, role] = f"{name}.{projection}.weight"
    head = _unembedding(model)
    entries = _entries(model, {*wanted.values(), head}, files, per_layer, strategy)
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers = []
    with torch.device("cpu"), torch.no_grad():  # a model that is about to be loaded is made on the meta device
        directions = nsds.output_directions(entries[head].read())
        for name in tqdm(layers, desc="NSDS", disable=None):
            weights = {role: entries[wanted[name, role]].read() for role in PROJECTIONS if (name, role) in wanted}
            numbers.append(
                nsds.layer_numbers(nsds.LayerWeights(gate=weights.pop("gate", None), **weights), head_dim, directions)
            )
    scores = nsds.combine(*zip(*numbers, strict=True))
    given = nsds.allocate([one.score for one in scores], budget, *method.nsds)
    return [LayerAllocation(*row) for row in zip(layers, *zip(*scores, strict=True), given, strict=True)]


def _decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    layers = getattr(model.get_decoder(), "layers", [])
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in layers}


def _find(layer: nn.Module, path: str) -> nn.Module | None:
    found: Any = layer
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _unembedding(model: PreTrainedModel) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    name = f"{names[id(model.get_output_embeddings())]}.weight"
    return model.all_tied_weights_keys.get(name, name)


def _entries(
    model: PreTrainedModel, wanted: set[str], files: Sequence[str | Path] | None, per_layer: str, strategy: str
) -> dict[str, Entry]:
    """Returns where parameters lie in the files, whatever they are called there."""
    from hf_rb.io.parameter_names import ParameterNames

    if not files or any(Path(file).suffix != ".safetensors" for file in files):
        raise ValueError(
            f"`{per_layer}={strategy!r}` reads the weights of all layers before they are loaded, from safetensors "
            "files. Save the model with `save_pretrained` and load it from there."
        )
    find, found = ParameterNames(model), {}
    for file in files:
        for name, entry in read_header(Path(file))[0].items():
            parameters, converter, *_ = find(name)
            if converter is None and parameters:
                found[parameters[0]] = entry
    tied = model.all_tied_weights_keys
    found |= {kept: found[copy] for copy, kept in tied.items() if copy in found and kept not in found}
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"`{per_layer}={strategy!r}` does not find {missing[0]} in {Path(files[0]).parent}.")
    return found
