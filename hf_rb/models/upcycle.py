"""
Upcycling: a dense checkpoint becomes a mixture of experts, tensor by tensor, without building either model.

The d neurons of a dense MLP are cut into s splits, and every split becomes E / s experts. Because a split is 1 / s of
the sum over neurons and the weights of the chosen experts add up to 1, its down projection is multiplied by s:

    s = 1          E copies of the MLP. Any router gives the dense model, since the copies agree.
    s = E          neuron split: E thin experts, which together have the dense model's size.
    1 < s < E      replicated splits.

For s > 1 and a multiple of s experts per token, the learned router starts in groups: experts that together hold every
split once share a row (the virtual groups of https://huggingface.co/papers/2410.07524), so that whole groups are
chosen with equal weights, and the result is the dense model again. In bfloat16 two groups may tie, and a token then
gets parts of both: 0.3 % of them with 4 groups of 2, measured on the embedded teacher. An MPI router multiplies the
shared row by each expert's own weights: it starts near the dense model only for s = 1, where on the other hand its
rows turn to one and the same direction, the principal one of the copies.

Qwen2-MoE has a shared expert beside these, which every token uses with the weight sigmoid(0) = 1/2 of a gate that
starts at zero. It gets some of the neurons, about as many as a split, with its down projection times 2; the splits
share the rest.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from hf_rb.evaluation import find_model
from hf_rb.hub import ModelCardData, write_model_card
from hf_rb.io.files import atomic_folder
from hf_rb.io.model_folder import check_apart, check_plain, copy_companions
from hf_rb.io.safetensors import Checkpoint, Entry, Output, standard_names, write_index, write_tensors
from hf_rb.io.skeleton import loading_problem
from hf_rb.models.mpi.functional import effective_router
from hf_rb.models.router_report import row_cosine
from hf_rb.utils.progress import tqdm


__all__ = ["UpcycleReport", "upcycle"]

logger = logging.get_logger(__name__)

MLP = re.compile(r"(?P<layer>.*\.layers\.(?P<index>\d+)\.)mlp\.(?P<matrix>gate|up|down)_proj\.weight")
# Mean |cos| of MPI rows on a 128 x 256 gate with singular values j^-0.6, from copies to splits: 0.44 to 0.32; of
# unrelated rows 0.05.
SIMILAR = 0.375


@dataclass(frozen=True)
class _Family:
    """The mixture that a dense architecture becomes, and how its checkpoints name experts."""

    target: str
    width: str
    block: str
    matrices: dict[str, str]
    shared: bool = False


_PROJECTIONS = {matrix: f"{matrix}_proj" for matrix in ("gate", "up", "down")}
_MIXTRAL = _Family("mixtral", "intermediate_size", "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})
FAMILIES = {
    "qwen2": _Family("qwen2_moe", "moe_intermediate_size", "mlp", _PROJECTIONS, shared=True),
    "qwen3": _Family("qwen3_moe", "moe_intermediate_size", "mlp", _PROJECTIONS),
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
}
GEMMA = (
    "transformers has no mixture with Gemma's scaled embeddings and norms but Gemma 4's, which has further norms "
    "around its experts"
)


@dataclass
class UpcycleReport:
    """Report of upcycling.

    Attributes:
        num_experts, top_k, splits (`int`): E, K and s.
        mpi (`bool`): Whether the routers are MPI's.
        exact (`bool`): Whether the mixture computes what the dense model does, up to rounding.
        dense_parameters, parameters, active_parameters (`int`): Of the dense model, of the mixture, and of those what
            one token uses.
        row_cosine (`float`): Mean |cos| between two rows of a learned router, over pairs and layers.
        effective_row_cosine (`float`): The same of the rows that MPI makes of them.
        warnings (`list[str]`): What to think about before training.
    """

    num_experts: int
    top_k: int
    splits: int
    mpi: bool
    exact: bool
    dense_parameters: int = 0
    parameters: int = 0
    active_parameters: int = 0
    row_cosine: float = 0.0
    effective_row_cosine: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes, for JSON."""
        return asdict(self)


def upcycle(
    source: str | Path,
    destination: str | Path,
    num_experts: int = 8,
    top_k: int = 2,
    *,
    splits: int = 1,
    mpi: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    variant: str | None = None,
    subfolder: str = "",
) -> UpcycleReport:
    """
    Writes a mixture of experts made from a dense Qwen2, Qwen3, Llama or Mistral checkpoint, with the memory of a few
    tensors.

    Qwen3 becomes Qwen3-MoE, Qwen2 (and 2.5) Qwen2-MoE, Llama and Mistral become Mixtral. The folder appears at
    `destination` in one step when it is complete.

    Args:
        source (`str` or `Path`):
            Model folder, Hub id or embedded model (`"tiny:student"`), dense and not quantized.
        destination (`str` or `Path`):
            Folder to write.
        num_experts (`int`, *optional*, defaults to `8`):
            Experts E of a layer, a multiple of `splits`.
        top_k (`int`, *optional*, defaults to `2`):
            Experts K that a token uses.
        splits (`int`, *optional*, defaults to `1`):
            Parts s into which the neurons of an MLP are cut, a divisor of its width. 1 copies, `num_experts` splits, a
            number between does both. With `top_k=splits` a token costs what it cost before.
        mpi (`bool`, *optional*, defaults to `False`):
            Whether to write the MPI class of the family, whose effective routers follow their experts
            (https://huggingface.co/papers/2606.12397).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the routers, the only part that is drawn.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar, on a terminal.
        variant (`str`, *optional*), subfolder (`str`, *optional*, defaults to `""`):
            Which weights of the model, and where in its folder, as in `from_pretrained`.

    Returns:
        [`UpcycleReport`]

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model, or it has no safetensors files.
        ValueError: Numbers that do not fit, or a model that has no mixture of the same layout.
    """
    folder, destination = find_model(str(source), subfolder=subfolder), Path(destination)
    check_apart(folder, destination)
    check_plain(folder)
    dense = AutoConfig.from_pretrained(folder)
    _check(dense, num_experts, top_k, splits, mpi)
    shared = _shared_width(dense, splits)
    config = _mixture_config(dense, num_experts, top_k, splits, mpi, shared)
    grouped = top_k % splits == 0 and not mpi
    report = UpcycleReport(num_experts, top_k, splits, mpi, exact=splits == 1 or grouped)
    work = _Work(FAMILIES[dense.model_type], num_experts, splits, shared, dense.initializer_range, seed, grouped)
    checkpoint = Checkpoint(folder, variant)
    _count(report, dense, config)
    with atomic_folder(destination, overwrite) as result:
        names = standard_names(len(checkpoint.files))
        layers = sum(bool(MLP.fullmatch(name)) for name in checkpoint.entries)
        with tqdm(total=layers, desc="upcycle", delay=2, disable=None if progress else True) as bar:
            for name, shard in zip(names, checkpoint.shards, strict=True):
                write_tensors(result / name, work.outputs(shard, bar))
        if len(names) > 1:
            write_index(result, names)
        _complete(result, folder, config, str(source), destination.name, report)
        if problem := loading_problem(config.to_dict(), Checkpoint(result).entries, extra=True):
            raise ValueError(
                f"{source} has other tensors than a {dense.model_type} model that can be upcycled: {problem}."
            )
    for rows, effective in work.cosines:
        report.row_cosine += rows / len(work.cosines)
        report.effective_row_cosine += effective / len(work.cosines)
    _warn(report)
    return report


def _check(dense: PreTrainedConfig, num_experts: int, top_k: int, splits: int, mpi: bool) -> None:
    if dense.model_type not in FAMILIES:
        why = GEMMA if dense.model_type.startswith("gemma") else "hf_rb knows no mixture of its layout"
        raise ValueError(
            f"A model of type {dense.model_type!r} cannot be upcycled: {why}. Use one of {', '.join(FAMILIES)}, "
            "which have a mixture of experts with the same attention and norms."
        )
    if mpi and f"mpi_{FAMILIES[dense.model_type].target}" not in CONFIG_MAPPING:
        raise ValueError(
            f"There is no MPI class of {FAMILIES[dense.model_type].target}. Leave out `mpi` (`--mpi`), or give the "
            "upcycled model MPI routers in memory, with `apply_mpi`."
        )
    if getattr(dense, "quantization_config", None):
        raise ValueError("The model is quantized. Upcycle the model it was made from, and quantize the result.")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(dense, name, False) and name not in _names(CONFIG_MAPPING[FAMILIES[dense.model_type].target]):
            raise ValueError(f"The model has {name}=True, for which {FAMILIES[dense.model_type].target} has no place.")
    if "sliding_attention" in (getattr(dense, "layer_types", None) or ()):
        raise ValueError(
            "Layers with a sliding window between others cannot be upcycled: the mixtures have one kind of layer."
        )
    if not 1 <= top_k <= num_experts or num_experts < 2:
        raise ValueError(
            f"num_experts={num_experts} and top_k={top_k} do not fit: write 2 or more experts, and 1 <= top_k <= that."
        )
    shared = FAMILIES[dense.model_type].shared
    uneven = splits >= dense.intermediate_size if shared else splits > 0 and dense.intermediate_size % splits
    if splits < 1 or num_experts % splits or uneven:
        raise ValueError(
            f"splits={splits} must divide num_experts={num_experts} and the {dense.intermediate_size} neurons of the "
            f"MLPs: 1 copies them, {num_experts} gives every expert its own."
        )


def _shared_width(dense: PreTrainedConfig, splits: int) -> int:
    """
    Returns how many neurons the shared expert of a family that has one gets: about as many as a split, which is cut in
    powers of two up to 128, since kernels take no odd widths.
    """
    if not FAMILIES[dense.model_type].shared:
        return 0
    width = dense.intermediate_size
    split = width // (splits + 1)
    block = min(gcd(width, 128), 1 << (split.bit_length() - 1))
    return width - splits * (split // block * block)


def _names(config_class: type) -> set[str]:
    return {one.name for one in fields(config_class)}


def _mixture_config(
    dense: PreTrainedConfig, num_experts: int, top_k: int, splits: int, mpi: bool, shared: int
) -> PreTrainedConfig:
    family = FAMILIES[dense.model_type]
    config_class = CONFIG_MAPPING[f"mpi_{family.target}" if mpi else family.target]
    values = {name: value for name, value in dense.to_dict().items() if name in _names(config_class) | {"head_dim"}}
    for name in ("architectures", "model_type", "transformers_version"):
        values.pop(name, None)
    values |= {
        "num_experts_per_tok": top_k,
        "num_experts": num_experts,
        family.width: (dense.intermediate_size - shared) // splits,
    }
    if family.shared:
        values["shared_expert_intermediate_size"] = shared
    if "norm_topk_prob" in _names(config_class):
        values["norm_topk_prob"] = True  # the weights of the chosen experts add up to 1
    return config_class(**values)


class _Work:
    """Makes the tensors of a mixture from those of a dense checkpoint."""

    def __init__(
        self, family: _Family, num_experts: int, splits: int, shared: int, std: float, seed: int, grouped: bool
    ):
        self.shared = shared
        self.family, self.num_experts, self.splits, self.std, self.grouped = family, num_experts, splits, std, grouped
        self.seed = seed
        self.cosines: list[tuple[float, float]] = []

    def outputs(self, shard: dict[str, Entry], bar: tqdm) -> dict[str, Output]:
        outputs = {}
        for name, entry in shard.items():
            found = MLP.fullmatch(name)
            if not found:
                outputs[name] = Output.copy(entry)
                continue
            block = found["layer"] + self.family.block
            for expert in range(self.num_experts):
                key = f"{block}.experts.{expert}.{self.family.matrices[found['matrix']]}.weight"
                outputs[key] = self._expert(entry, found["matrix"], expert % self.splits)
            if self.shared:
                matrix = self.family.matrices[found["matrix"]]
                outputs[f"{block}.shared_expert.{matrix}.weight"] = self._expert(entry, found["matrix"], None)
                if found["matrix"] == "gate":
                    zeros = torch.zeros(1, entry.shape[1], dtype=entry.dtype)
                    outputs[f"{block}.shared_expert_gate.weight"] = Output.of(zeros)
            if found["matrix"] == "gate":
                outputs[f"{block}.gate.weight"] = Output.of(self._router(entry, int(found["index"])))
            bar.update()
        return outputs

    def _expert(self, entry: Entry, matrix: str, split: int | None) -> Output:
        shape, neurons = list(entry.shape), int(matrix == "down")
        shape[neurons] = self.shared if split is None else (shape[neurons] - self.shared) // self.splits

        def chunks() -> Iterator[Tensor]:
            yield self._part(entry.read(), matrix, split).reshape(-1)

        return Output(entry.dtype, tuple(shape), chunks)

    def _part(self, weight: Tensor, matrix: str, split: int | None) -> Tensor:
        """Returns a split's neurons of a matrix, or the shared expert's; a sum with these weights is the dense
        model's.
        """
        down = matrix == "down"
        shared, rest = weight.tensor_split([self.shared], dim=int(down))
        part = shared if split is None else rest.chunk(self.splits, dim=int(down))[split]
        return part * (2 if split is None else self.splits) if down else part

    def _router(self, entry: Entry, layer: int) -> Tensor:
        """Draws the router of a layer, and notes how alike its rows are, as they are and as MPI would use them."""
        copies, splits = self.num_experts // self.splits, self.splits
        groups = copies if self.grouped else self.num_experts
        generator = torch.Generator().manual_seed(self.seed * 100_003 + layer)  # whatever file the layer lies in
        rows = self.std * torch.randn(groups, entry.shape[1], generator=generator)
        rows = rows.repeat_interleave(self.num_experts // groups, dim=0)
        gate, effective = entry.read(), torch.empty_like(rows)
        for split in range(splits):
            part = self._part(gate, "gate", split).float().expand(copies, -1, -1)
            effective[split::splits] = effective_router(rows[split::splits], part, scale=1.0)
        self.cosines.append((row_cosine(rows), row_cosine(effective)))
        return rows.to(entry.dtype)


def _complete(
    folder: Path, source_folder: Path, config: PreTrainedConfig, source: str, name: str, report: UpcycleReport
) -> None:
    """Writes what belongs to the weights."""
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)
    copy_companions(source_folder, folder)
    options = {name: getattr(report, name) for name in ("num_experts", "top_k", "splits")}
    card = ModelCardData(name, ["mpi"] if report.mpi else [], base_model=source, hyperparameters=options)
    start = (
        "It computes what the dense model does, up to rounding"
        if report.exact
        else "It does not start as the dense model"
    )
    card.sections = {
        "Not trained": "The experts are copies or parts of the dense model's MLPs, and the routers are drawn at "
        f"random. {start}, and its experts have not specialized: train it before use. It has {report.parameters:,} "
        f"parameters, of which a token uses {report.active_parameters:,}; the dense model has "
        f"{report.dense_parameters:,}."
    }
    write_model_card(folder, card)


def _count(report: UpcycleReport, dense: PreTrainedConfig, config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        before, after = (AutoModelForCausalLM.from_config(one).num_parameters() for one in (dense, config))
    expert = 3 * dense.hidden_size * getattr(config, FAMILIES[dense.model_type].width) * dense.num_hidden_layers
    report.dense_parameters, report.parameters = before, after
    report.active_parameters = after - (report.num_experts - report.top_k) * expert


def _warn(report: UpcycleReport) -> None:
    if report.mpi and report.effective_row_cosine > SIMILAR:
        remedy = (
            f"Prefer `splits` of more than {report.splits}."
            if report.splits < report.num_experts
            else "Expect experts to specialize slowly, or train without MPI."
        )
        report.warnings.append(
            f"The rows of the effective routers have a mean |cos| of {report.effective_row_cosine:.2f} "
            f"({report.row_cosine:.2f} in the learned ones): experts made from the same neurons share the direction "
            f"that MPI turns rows to, so tokens hardly tell them apart. {remedy}"
        )
    if not report.exact:
        why = (
            "with MPI the experts of a group get different rows"
            if report.mpi
            else f"top_k={report.top_k} is no multiple of splits={report.splits}"
        )
        report.warnings.append(
            f"The mixture does not start as the dense model: {why}. Expect a jump in the loss before training."
        )
    for message in report.warnings:
        logger.warning(message)
