"""The memory of a training run by what it is for, from the recipe, `config.json` and the headers of the weight files.

The peak of a step is what is always there (weights, teacher, optimizer) plus the larger of two moments: the end of the
forward pass, when every activation is kept and the LM head works on a tile of logits, and the end of the backward
pass, when every gradient is there. Gradients of accumulated steps are there at both. Generation, where a run has it,
is a third moment, and loading a fourth: files are mapped into memory, and of a mixture the experts are there one by
one before they are joined.

Activations are what autograd keeps of a decoder layer (H hidden size, A width of the attention heads, F width of the
MLP, for every token): two norms with their input, normalized and output values, the attention's query, key, value and
output, and four values of width F of a gated MLP, three of a plain one. Standard library only.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from hf_rb.io.weight_files import weight_files


__all__ = ["WEIGHT_BYTES", "Architecture", "Run", "estimate", "estimate_audit", "peak"]

MEBI = 1 << 20
# Of an element, by the names of safetensors' headers and of transformers' configurations.
TENSOR_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
                "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
WEIGHT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# Bytes of optimizer state for every trained weight; Adam in 32 bit, with two moments, where an optimizer is not
# listed.
OPTIMIZER = {"sgd": 0, "adafactor": 0, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4, "lion_8bit": 1, "adamw_8bit": 2,
             "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adamw_torch_8bit": 2, "adamw_torch_4bit": 1}  # fmt: skip
# PEFT adapts these when a recipe does not say; nearly all decoders that it knows have these two.
DEFAULT_TARGETS = ["q_proj", "v_proj"]
# The tile that TRL's LM head works on, and how many of it a CPU, which has no fused kernel for it, holds at once.
TRL_TILE, TRL_COPIES = (4096, 32768), {"cpu": 8, "cuda": 1}
# Ours: bytes of the tiles of student and teacher with what a rule makes of them.
OUR_TILES = {"cpu": 128 * MEBI, "cuda": 1024 * MEBI}
# On a CPU the interpreter with torch, transformers and TRL (440 MiB), tokenizer and data; on a GPU, its libraries.
RUNTIME = {"cpu": 540 * MEBI, "cuda": 600 * MEBI}
# The share of what a layer frees again that a CPU's allocator does not give to the next layer (measured with glibc,
# whose aligned blocks do not fit into the holes that blocks of their own size have left).
UNUSABLE = {"cpu": 0.2, "cuda": 0.0}
# The share of freed memory that stays unusable after experts were joined (measured: 0.6 to 0.9).
UNUSABLE_EXPERTS = 0.75


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder that memory depends on, read from its folder.

    Attributes:
        hidden, layers, attention, key_value, mlp, vocabulary (`int`):
            Widths: of the residual stream, of all query heads together, of all key heads together, and of the MLP.
        experts, active (`int`): Experts of a layer, and those that a token goes through; 1 and 1 without a mixture.
        gated (`bool`): Whether the MLP has a gate.
        tied (`bool`): Whether the LM head is the embedding.
        weights (`int`): Number of weights; counted in the files where they are there, else from the widths.
        file_bytes (`int`, *optional*): Bytes of the tensors in the files.
        dtype (`str`): Type of the file's weights.
        separate (`int`): Weights of experts that the files hold one by one, and the model joined.
        packed (`bool`): Whether the checkpoint is quantized.
    """

    hidden: int
    layers: int
    attention: int
    key_value: int
    mlp: int
    vocabulary: int
    experts: int
    active: int
    gated: bool
    tied: bool
    weights: int
    file_bytes: int | None
    dtype: str
    packed: bool
    separate: int = 0

    @classmethod
    def read(cls, folder: Path) -> "Architecture":
        """Reads a model folder.

        Raises:
            ValueError: No `config.json` of a decoder: a width is missing.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            text = config.get("text_config") or config
            return cls._of(config, text, _tensors(folder))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'config.json'} does not describe a decoder: {error!r}.") from error

    @classmethod
    def _of(cls, config: dict, text: dict, tensors: list[tuple[str, str, int]]) -> "Architecture":
        def first(*names: str, default: int | None = None) -> int:
            found = next((text[name] for name in names if text.get(name) is not None), default)
            if found is None:
                raise KeyError(names[0])
            return int(found)

        hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
        head = first("head_dim", default=hidden // heads)
        experts = first("num_experts", "num_local_experts", "n_routed_experts", default=1)
        widths = {
            "hidden": hidden,
            "layers": first("num_hidden_layers", "n_layer"),
            "attention": heads * head,
            "key_value": first("num_key_value_heads", default=heads) * head,
            "mlp": first(
                *(["moe_intermediate_size"] if experts > 1 else []), "intermediate_size", "n_inner", default=4 * hidden
            ),
            "vocabulary": first("vocab_size"),
            "experts": experts,
            "active": first("num_experts_per_tok", default=1),
            "gated": str(text.get("hidden_act", "gelu")).startswith(("silu", "swish", "gelu_pytorch_tanh")),
            # Configurations leave it out where it is transformers' default.
            "tied": bool(config.get("tie_word_embeddings", "n_embd" in text)),
        }
        packed = "quantization_config" in config
        counted = sum(count for _, _, count in tensors)
        return cls(
            **widths,
            weights=counted if counted and not packed else _weights(**widths),
            file_bytes=sum(TENSOR_BYTES.get(kind, 4) * count for _, kind, count in tensors) or None,
            dtype=str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "float32"),
            packed=packed,
            separate=sum(count for name, _, count in tensors if re.search(r"\.experts\.\d+\.", name)),
        )

    def linear(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of a linear layer of the decoder, by the last part of its name."""
        h, a, kv, f = self.hidden, self.attention, self.key_value, self.mlp
        shapes = {"q_proj": (h, a), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (a, h), "gate_proj": (h, f),
                  "up_proj": (h, f), "down_proj": (f, h), "c_attn": (h, a + 2 * kv),
                  "c_fc": (h, f), "c_proj": (f, h)}  # fmt: skip
        return shapes.get(name.rpartition(".")[2], (0, 0))


def _tensors(folder: Path) -> list[tuple[str, str, int]]:
    """Returns name, type and number of elements of every tensor of the model. The list is empty for a folder without
    safetensors.
    """
    try:
        files = weight_files(folder).files
    except (FileNotFoundError, ValueError):
        return []
    found = []
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        found += [(name, entry["dtype"], prod(entry["shape"])) for name, entry in header.items()]
    return found


def _weights(
    hidden: int,
    layers: int,
    attention: int,
    key_value: int,
    mlp: int,
    vocabulary: int,
    experts: int,
    active: int,
    gated: bool,
    tied: bool,
) -> int:
    attention_weights = hidden * (2 * attention + 2 * key_value)
    mlp_weights = experts * hidden * mlp * (3 if gated else 2) + (experts * hidden if experts > 1 else 0)
    return layers * (attention_weights + mlp_weights + 2 * hidden) + vocabulary * hidden * (1 if tied else 2) + hidden


@dataclass(frozen=True)
class Run:
    """Settings of a recipe that memory depends on, beside its models.

    Attributes:
        device (`str`): `"cpu"` or `"cuda"`.
        tokens (`int`): Tokens of one forward pass of one process.
        length (`int`): Tokens of its longest sequence.
        weight_bytes (`int`): Bytes of a weight of the student as it is loaded.
        compute_bytes (`int`): Bytes of an activation: 2 under autocast.
        checkpointing (`bool`): Whether activations are computed again in the backward pass.
        accumulates (`bool`): Whether gradients of several passes are added up.
        optimizer (`str`): Value of `optim`.
        targets (`list[str]`, *optional*): Layers that LoRA adapts; `None` trains everything.
        rank (`int`): Rank of LoRA.
        dropout (`float`): Dropout of LoRA.
        eager (`bool`): Whether attention keeps its scores.
        head (`str`): How the LM head works: `"trl"`, `"tiled"` (ours), `"dense"`.
        quantized_bits (`float`, *optional*): Bits of a weight of the quantized layers.
        generated (`int`): Sequences that are generated at a time; 0 for none.
    """

    device: str
    tokens: int
    length: int
    weight_bytes: int
    compute_bytes: int
    checkpointing: bool
    accumulates: bool
    optimizer: str
    targets: list[str] | None
    rank: int
    dropout: float
    eager: bool
    head: str
    quantized_bits: float | None = None
    generated: int = 0


def estimate(model: Architecture, run: Run, frozen: Sequence[tuple[Architecture, int]] = ()) -> dict[str, int]:
    """Estimates the bytes of a run by what they are for.

    Args:
        model ([`Architecture`]): The model in training.
        run ([`Run`]): The recipe.
        frozen (`Sequence[tuple[Architecture, int]]`, *optional*): Teachers and references, with the bytes of their
            weights' type.

    Returns:
        `dict[str, int]`: Bytes of `weights`, `gradients`, `optimizer`, `activations`, `logits`, `teacher` (and
        reference), `cache` (of generation), `loading` (beside what is loaded) and `runtime` (interpreter, libraries,
        data, and what the allocator cannot use again).
    """
    trained = _adapted(model, run) if run.targets is not None else model.weights
    # Adapters are trained in 32 bit; the head and the embedding, when they are one, have a gradient each before these
    # are added.
    gradients = trained * (4 if run.targets is not None else run.weight_bytes)
    if run.targets is None and model.tied:
        gradients += model.vocabulary * model.hidden * run.weight_bytes
    loads = [_Load.of(one, size, run) for one, size in [(model, run.weight_bytes), *frozen]]
    return {
        "weights": _weight_bytes(model, run) + trained * 4 * (run.targets is not None),
        "gradients": gradients,
        "optimizer": trained * OPTIMIZER.get(run.optimizer.removesuffix("_fused"), 8),
        "activations": _activations(model, run),
        "logits": _logits(model, run),
        "teacher": sum(_teacher(teacher, size, run) for teacher, size in frozen),
        "cache": run.generated * run.length * 2 * model.key_value * model.layers * run.compute_bytes,
        "loading": _loading(loads),
        "runtime": RUNTIME[run.device]
        + int(UNUSABLE[run.device] * model.layers * run.tokens * _freed(model, run))
        + sum(load.unusable for load in loads),
    }


def estimate_audit(model: Architecture, run: Run, frozen: Sequence[tuple[Architecture, int]] = ()) -> dict[str, int]:
    """
    Estimates the bytes of `hf-rb audit`. It makes all logits and has no optimizer. `comparison` is what it holds
    besides: the gradients of the two paths that it compares, and at the end a copy of the student, which then is the
    teacher.
    """
    parts = estimate(model, replace(run, head="dense", optimizer="sgd", accumulates=False), frozen)
    return parts | {"comparison": 2 * parts["gradients"] + model.weights * run.weight_bytes}


def peak(parts: dict[str, int], accumulates: bool) -> int:
    """Returns the highest sum of what is there at one moment."""
    loaded = parts["weights"] + parts["teacher"] + parts["runtime"]
    always = loaded + parts["optimizer"] + parts.get("comparison", 0)
    forward = parts["activations"] + parts["logits"] + (parts["gradients"] if accumulates else 0)
    return max(loaded + parts.get("loading", 0), always + max(forward, parts["gradients"], parts["cache"]))


@dataclass(frozen=True)
class _Load:
    """Bytes of a model (`weights`), of what loading needs in addition (`beside`), and of what stays unusable
    afterwards (`unusable`).
    """

    weights: int
    beside: int
    unusable: int

    @classmethod
    def of(cls, model: Architecture, size: int, run: Run) -> "_Load":
        weights = model.weights * size
        converted = model.file_bytes is not None and model.file_bytes != weights
        if run.device != "cpu" or model.packed or not (converted or model.separate):
            return cls(weights, 0, 0)  # tensor by tensor, or the mapped files are the weights
        experts = model.separate * size
        if not converted:  # experts are copied out of the mapped files, which stay: the other weights are in them
            return cls(weights, 0, experts)
        unusable = int(UNUSABLE_EXPERTS * experts)
        return cls(weights, (model.file_bytes or 0) + experts - unusable, unusable)


def _loading(loads: list[_Load]) -> int:
    """Returns by how many bytes loading exceeds the sum of all models. They are loaded in turn, so the later ones are
    not there yet.
    """
    later = sum(load.weights for load in loads)
    highest = 0
    for load in loads:
        later -= load.weights
        highest = max(highest, load.beside - later)
    return highest


def _weight_bytes(model: Architecture, run: Run) -> int:
    if model.packed and model.file_bytes:
        return model.file_bytes
    embeddings = model.vocabulary * model.hidden * (1 if model.tied else 2)
    if run.quantized_bits is not None:
        return int((model.weights - embeddings) * run.quantized_bits / 8) + embeddings * run.weight_bytes
    # Autocast keeps the cast weights from the forward pass to the backward pass.
    cast = (model.weights - embeddings) * run.compute_bytes if run.compute_bytes < run.weight_bytes else 0
    return model.weights * run.weight_bytes + cast


def _adapted(model: Architecture, run: Run) -> int:
    return model.layers * run.rank * sum(sum(model.linear(name)) for name in run.targets or ())


def _activations(model: Architecture, run: Run) -> int:
    layer = run.tokens * _layer(model, run)
    stream = run.tokens * model.hidden * run.weight_bytes
    return (model.layers * stream + layer if run.checkpointing else model.layers * layer) + 3 * stream


def _layer(model: Architecture, run: Run) -> int:
    """Bytes that autograd keeps of one layer, for one token."""
    c, f = run.compute_bytes, model.mlp * model.active * run.compute_bytes
    # A norm works in 32 bit whatever its input is.
    norms = 2 * model.hidden * (4 + run.weight_bytes + c)
    attention = (3 * model.attention + 2 * model.key_value) * c
    mlp = f * (4 if model.gated else 3)
    if (
        run.targets is not None
    ):  # a frozen layer does not keep its input; an adapter keeps it, and its dropout a second time
        kept = sum(model.linear(name)[0] for name in run.targets) * c * (2 if run.dropout else 1)
        norms, attention, mlp = 2 * model.hidden * 4, attention - model.attention * c, mlp - f
        attention += kept
    if run.eager:
        attention += 3 * model.attention // max(model.hidden, 1) * run.length * c
    return norms + attention + mlp


def _freed(model: Architecture, run: Run) -> int:
    """Bytes that the forward pass of one layer allocates and frees, for one token."""
    passing = 15 * model.hidden * run.compute_bytes  # residuals, rotated queries and keys, the squares of the norms
    if run.targets is not None:  # the adapter's output, scaled, and the sum with the layer's
        passing += 3 * sum(model.linear(name)[1] for name in run.targets) * run.compute_bytes
    return passing + (_layer(model, run) if run.checkpointing else 0)


def _logits(model: Architecture, run: Run) -> int:
    dense = (
        8 * run.tokens * model.vocabulary * 4
    )  # two models' logits, their log-probabilities, a loss and its gradient
    if run.head == "dense":
        return dense
    head_gradient = model.vocabulary * model.hidden * 4 if run.targets is None else 0
    if run.head == "tiled":
        return min(OUR_TILES[run.device], dense) + head_gradient
    rows, columns = min(run.tokens, TRL_TILE[0]), min(model.vocabulary, TRL_TILE[1])
    return head_gradient + rows * columns * (run.compute_bytes + 4 * (TRL_COPIES[run.device] - 1))


def _teacher(model: Architecture, size: int, run: Run) -> int:
    """A frozen model and what one of its layers works on; the layers' values are not kept."""
    weights = model.file_bytes if model.packed and model.file_bytes else model.weights * size
    return weights + run.tokens * size * (2 * model.hidden + 3 * model.mlp * model.active)
