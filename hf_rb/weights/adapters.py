"""LoRA adapters as deltas: which of them may move to another model, and sums of them.

The delta of a module is  s B A  with A `(r, in)`, B `(out, r)` and s = alpha / r (rank-stabilized: alpha / sqrt(r)).
The sum of several is again an adapter, exactly, by concatenation:

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

of a rank that is the sum of theirs, or nearly, by the singular value decomposition, of any rank. Adding the As and the
Bs by themselves is another thing, with cross terms.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rb import __version__
from hf_rb.hub import ModelCardData, write_model_card
from hf_rb.io.files import atomic_folder
from hf_rb.io.model_folder import ADAPTER_CONFIG, check_apart, copy_companions, find_model, public_name
from hf_rb.io.resumable import write_json
from hf_rb.io.safetensors import Entry, Output, read_header, write_tensors
from hf_rb.weights.report import MergeReport, TensorReport
from hf_rb.weights.source import Source, some
from hf_rb.weights.sweep import REPORT


__all__ = [
    "REMEDY",
    "Adapter",
    "adapter_problems",
    "combine_adapters",
    "factor_svd",
    "is_adapter",
    "retarget",
    "write_adapter",
]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys with which an adapter does not depend on the weights of the model that it was trained on: its delta is s B A
# on any.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip
# Initializations with a zero delta: the base model's weights stay what they were.
ZERO_STARTS = (True, False, "gaussian", "eva", "orthogonal")
REASONS = {
    "use_dora": "DoRA scales the weights of the model it was trained on; its delta is another one on another model",
    "modules_to_save": "`modules_to_save` holds whole modules of Base, which would replace those of the other model",
    "trainable_token_indices": "`trainable_token_indices` holds whole rows of Base's embeddings, which would replace "
    "the other model's",
    "lora_bias": "`lora_bias` trains biases too, for which a merged weight has no place",
    "layer_replication": "`layer_replication` makes a model of other layers",
    "target_parameters": "`target_parameters` adapts parameters such as fused experts, whose files have other names; "
    "merge it in memory with `PeftModel.from_pretrained(...).merge_and_unload()`",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and cannot be merged",
}
REMEDY = "Train a plain LoRA (`init_lora_weights: true`), or tune all weights and graft their delta."


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_problems(config: Mapping[str, Any], names: Sequence[str] = ()) -> list[str]:
    """
    Returns why an adapter means another delta on another model, or cannot be added to weights at all; empty if it is a
    plain LoRA.

    Args:
        config (`Mapping`):
            `adapter_config.json`.
        names (`Sequence[str]`, *optional*):
            The names of the adapter's tensors.
    """
    if (kind := config.get("peft_type")) != "LORA":
        return [f"its type is {kind}; only LoRA adds a delta that does not depend on the model"]
    problems = [reason for key, reason in REASONS.items() if config.get(key)]
    start = config.get("init_lora_weights", True)
    if start not in ZERO_STARTS:
        problems.append(
            f"it began as {start!r}, which changes the weights of Base before training: on another model it changes "
            "something without any training. Save it with `path_initial_model_for_weight_conversion` to get a plain "
            "one"
        )
    if config.get("bias", "none") != "none":
        problems.append(
            f"`bias: {config['bias']}` holds whole biases of Base, which would replace those of the other model"
        )
    # An option of a later PEFT that is on could mean anything.
    unknown = [key for key, value in config.items() if key not in HARMLESS and key not in REASONS and value]
    problems += [f"`{key}: {config[key]}` is an option whose effect on another model is not known" for key in unknown]
    parts = [re.split(r"\.(?:lora_|base_layer)", name.removeprefix(PREFIX)) for name in names]
    heads = sorted({module for module, *rest in parts if "lm_head" in module or rest[:1] == ["embedding_A"]})
    if heads:
        problems.append(
            f"it adapts {some(heads)}: embeddings and heads are where Base and Instruct differ, and may be tied"
        )
    if not problems and (strange := [name for name in names if not re.search(r"\.lora_[AB]\.weight$", name)]):
        problems.append(f"it holds {some(sorted(strange))}, which is no factor of a LoRA")
    return problems


class Adapter:
    """
    A plain LoRA adapter in a folder.

    Args:
        folder (`Path`):
            Where `adapter_config.json` and `adapter_model.safetensors` are.
        name (`str`):
            What the user called it.

    Attributes:
        config (`dict`): Its configuration.
        modules (`list[str]`): The modules it adapts, by their names in the model.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: It is not plain (see [`adapter_problems`]), or a factor is missing.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.public_name = folder, name, public_name(name)
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{name} has no {WEIGHTS}. Save the adapter with `save_pretrained`; pickles are not read."
            )
        self.config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        self.entries: dict[str, Entry] = read_header(folder / WEIGHTS)[0]
        if problems := adapter_problems(self.config, list(self.entries)):
            raise ValueError(f"The adapter {name} cannot be moved or merged: {'; '.join(problems)}. {REMEDY}")
        self.modules = sorted({entry.split(".lora_")[0].removeprefix(PREFIX) for entry in self.entries})
        for module in self.modules:
            a, b = (self.entries.get(f"{PREFIX}{module}.lora_{factor}.weight") for factor in "AB")
            if a is None or b is None or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"The adapter {name} has no two factors of one rank for {module}. Copy or save it again."
                )

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Returns A `(r, in)` and s B `(out, r)` in float32."""
        a, b = (self.entries[f"{PREFIX}{module}.lora_{factor}.weight"].read().float() for factor in "AB")
        return a, self.scale(module, len(a)) * b

    def scale(self, module: str, rank: int) -> float:
        """Returns s, by the same rules as PEFT."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next(
            (patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), self.config["lora_alpha"]
        )
        return alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def delta(self, module: str) -> Callable[[slice], Tensor]:
        """Returns the function that computes rows of a module's delta, as they lie in the weight of the files."""
        a, b = self.factors(module)
        left, right = (a.mT, b.mT) if self.config.get("fan_in_fan_out") else (b, a)
        return lambda rows: left[rows] @ right

    def weights_of(self, source: Source) -> dict[str, str]:
        """
        Returns the module for each tensor of a model that the adapter changes.

        Raises:
            ValueError: The model lacks one, or it has another shape.
        """
        found = {module: source.name_of(f"{module}.weight") for module in self.modules}
        names = {module: name for module, name in found.items() if name is not None}
        if missing := [f"{module}.weight" for module in self.modules if module not in names]:
            raise ValueError(
                f"The adapter {self.name} adapts {some(missing)}, which {source.role} ({source.name}) does not have "
                "in its files."
            )
        for module, name in names.items():
            a, b = (self.entries[f"{PREFIX}{module}.lora_{factor}.weight"].shape for factor in "AB")
            shape = (a[1], b[0]) if self.config.get("fan_in_fan_out") else (b[0], a[1])
            if source.entries[name].shape != shape:
                raise ValueError(
                    f"{name} has the shape {source.entries[name].shape} in {source.role} ({source.name}) and {shape} "
                    "in the adapter."
                )
        return {name: module for module, name in names.items()}


def factor_svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Returns U, S and V of `b @ a` = U diag(S) V^T in float64, without the product: by QR of both factors and an SVD of
    rank r.

    Args:
        a (`torch.Tensor` of shape `(r, in)`), b (`torch.Tensor` of shape `(out, r)`):
            The factors.

    Returns:
        U `(out, q)`, S `(q,)` descending and V `(in, q)`, with q the smallest of r, in and out.
    """
    left, left_core = torch.linalg.qr(b.double())
    right, right_core = torch.linalg.qr(a.double().mT)
    u, values, v = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    return left @ u, values, right @ v.mT


def combine_adapters(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    destination: str | Path,
    *,
    rank: int | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """
    Writes the weighted sum of LoRA adapters of one base model as an adapter: exact by concatenation, or of a given
    rank.

    With the weights 1 - lambda and lambda it is what interpolating the two merged models would give.

    Args:
        adapters (`Sequence[str | Path]`):
            Folders or Hub ids.
        weights (`Sequence[float]`):
            What each delta is multiplied with.
        destination (`str` or `Path`):
            Folder to write.
        rank (`int`, *optional*):
            Rank of the result, by singular value decomposition. By default the sum of the ranks.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.

    Returns:
        [`MergeReport`] with the norms `wanted` of the sum and `error` of what a smaller rank has lost of it.

    Raises:
        FileExistsError, FileNotFoundError: As [`merge_models`].
        ValueError: An adapter is no plain LoRA, they are of different models, or the destination holds one of them.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` is {rank}; write 1 or more, or leave it out to keep all of both.")
    opened = [Adapter(find_model(str(name), adapter=True), str(name)) for name in adapters]
    bases = {adapter.config.get("base_model_name_or_path") for adapter in opened}
    layouts = {f"fan_in_fan_out: {bool(adapter.config.get('fan_in_fan_out'))}" for adapter in opened}
    for found in (bases, layouts):
        if len(found) > 1:
            names = ", ".join(sorted(map(str, found)))
            raise ValueError(f"The adapters are of different models: {names}. Their deltas cannot be added.")
    report = MergeReport(
        "interpolation",
        {f"adapter {number}": adapter.public_name for number, adapter in enumerate(opened, start=1)},
        "adapter 1",
        {"weights": list(weights), "rank": rank},
    )
    factors = {}
    for module in sorted({module for adapter in opened for module in adapter.modules}):
        pairs = [
            (weight, *adapter.factors(module))
            for weight, adapter in zip(weights, opened, strict=True)
            if module in adapter.modules
        ]
        shapes = {(a.shape[1], b.shape[0]) for _, a, b in pairs}
        if len(shapes) > 1:
            raise ValueError(f"{module} has different sizes in the adapters: {shapes}. They are of different models.")
        a, b = torch.cat([a for _, a, _ in pairs]), torch.cat([weight * b for weight, _, b in pairs], dim=1)
        u, values, v = factor_svd(a, b)
        wanted, lost = values.norm().item(), 0.0
        if rank is not None:
            lost, root = values[rank:].norm().item(), values[:rank].sqrt()
            a, b = (v[:, :rank] * root).mT.float(), (u[:, :rank] * root).float()
        factors[module] = a, b
        measured = {"wanted": wanted, "error": lost, "rank": len(a)}
        report.tensors.append(TensorReport(module, a.shape[1] * b.shape[0], measured=measured))
    write_adapter(destination, opened, factors, report, overwrite)
    return report


def write_adapter(
    destination: str | Path,
    adapters: Sequence[Adapter],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    report: MergeReport,
    overwrite: bool,
) -> None:
    """Writes an adapter whose deltas are `b @ a`, with everything else from the first of those it was made of."""
    destination, first = Path(destination), adapters[0]
    for adapter in adapters:
        check_apart(adapter.folder, destination)
    ranks = {module: len(a) for module, (a, _) in factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: own for module, own in ranks.items() if own != rank}
    targets = [adapter.config.get("target_modules") for adapter in adapters]
    config = first.config | {
        "r": rank,
        "lora_alpha": rank,  # so that s = 1
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        # Names in full mean the same modules whatever the adapters had.
        "target_modules": targets[0] if all(target == targets[0] for target in targets) else sorted(factors),
    }
    tensors = {}
    for module, pair in factors.items():
        for letter, factor in zip("AB", pair, strict=True):
            tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = Output.of(factor.contiguous())
    with atomic_folder(destination, overwrite) as folder:
        write_tensors(folder / WEIGHTS, tensors)
        _write_rest(folder, destination.name, first, config, report)


def retarget(adapter: Adapter, source: Source, destination: str | Path, overwrite: bool) -> MergeReport:
    """Writes an adapter as one of another model, for which it must fit."""
    adapter.weights_of(source)
    check_apart(adapter.folder, Path(destination))
    config = adapter.config | {"base_model_name_or_path": source.name, "revision": None, "inference_mode": True}
    report = MergeReport("shadow_ft", {"onto": public_name(source.name), "tuned": adapter.public_name}, "onto")
    with atomic_folder(destination, overwrite) as folder:
        shutil.copyfile(adapter.folder / WEIGHTS, folder / WEIGHTS)
        copy_companions(source.folder, folder)
        _write_rest(folder, Path(destination).name, adapter, config, report)
    return report


def _write_rest(folder: Path, name: str, adapter: Adapter, config: dict[str, Any], report: MergeReport) -> None:
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_companions(adapter.folder, folder)
    report.file_bytes = (folder / WEIGHTS).stat().st_size
    write_json(folder / REPORT, {"format_version": 1, "hf_rb": __version__} | asdict(report))
    shown = {key: value for key, value in (report.models | report.options).items() if value is not None}
    base = config.get("base_model_name_or_path")
    card = ModelCardData(
        name, [report.method], base_model=base, hyperparameters=shown, tags=["merge"], library_name="peft"
    )
    write_model_card(folder, card)
