"""Turns a quantized checkpoint into formats that need no hf_rb, tensor by tensor.

`dequantize_checkpoint` writes an ordinary model. `export_gptq` writes the 4-bit layout of GPTQ, which a tied PTQTP
layer fits exactly: with a_1 = 3 a_2 = 3 s, its weights are s * c with the integers c = 3 t_1 + t_2 from -4 to 4, so
they are symmetric 4-bit codes q = c + 8 with the zero point 8. For a layer with K inputs, N outputs and groups of G:

    qweight  int32 (K / 8, N)              code of weight (8 i + j, n) in the bits 4 j to 4 j + 3 of qweight[i, n]
    qzeros   int32 (ceil(K / G), N / 8)    the zero points in the same way along N, one less than they are ("gptq",
                                           version 1)
    scales   float16 (ceil(K / G), N)
    g_idx    int32 (K,)                    group of every input

and the weight (k, n) is  scales[g_idx[k], n] * (code - zero point).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils import logging

from hf_rb.evaluation import Size, model_size
from hf_rb.hub import ModelCardData, read_origin, write_model_card
from hf_rb.io.files import atomic_folder
from hf_rb.io.model_class import skeleton
from hf_rb.io.model_folder import check_plain, copy_companions, find_packed, quantization_method
from hf_rb.io.parameter_names import ParameterNames
from hf_rb.io.safetensors import Checkpoint, Output, standard_names, write_index, write_tensors
from hf_rb.quantizers.kernels.layout import Layout, unpack
from hf_rb.quantizers.packed.layer_kinds import is_transposed
from hf_rb.quantizers.packed.weight import SUFFIXES, PackedWeight
from hf_rb.quantizers.ptqtp.format import row_blocks
from hf_rb.utils.progress import tqdm


__all__ = ["dequantize_checkpoint", "export_gptq"]

logger = logging.get_logger(__name__)

ZERO_POINT = 8
CODES_PER_WORD = 8


def dequantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Size:
    """
    Writes a quantized checkpoint as an ordinary model, which loads without hf_rb, with the memory of about one tensor.

    Args:
        source (`str` or `Path`):
            Folder or Hub id of a model that was quantized with one of the methods of this package.
        destination (`str` or `Path`):
            Folder to write.
        dtype (`str`, *optional*):
            `"bfloat16"`, `"float16"` or `"float32"` for all floating tensors. By default the quantized layers get the
            type of the model and the others keep theirs.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar, on a terminal.

    Returns:
        [`~hf_rb.evaluation.Size`]: Size of the written model.

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model.
        ValueError: The model is not quantized by hf_rb, has corrections for which an ordinary model has no place, the
            destination holds it, or a packed tensor is damaged or missing.
    """
    packed = _PackedModel(source, destination, overwrite)
    packed_layers = {name.removesuffix(".weight") for name in packed.weights}
    empty = packed.quantizer.make_room(source, packed.model_config, packed.checkpoint.entries, packed_layers)
    cast = getattr(torch, dtype) if dtype else None

    def convert(name: str) -> dict[str, Output]:
        weight = packed.weights[name]
        target = cast or packed.dtype

        def chunks() -> Iterator[Tensor]:
            values = packed.read(name, lambda stored: stored.dequantize(weight.layout, target))
            yield (values.mT if weight.transposed else values).contiguous().view(-1)

        outputs = {name: Output(target, weight.shape, chunks)}
        if (module := name.removesuffix(".weight")) in empty:
            outputs[f"{module}.bias"] = Output.of(torch.zeros(weight.shape[0], dtype=target))
        return outputs

    return packed.rewrite(convert, None, cast, overwrite, progress)


def export_gptq(
    source: str | Path, destination: str | Path, *, overwrite: bool = False, progress: bool = True
) -> Size:
    """
    Writes a PTQTP checkpoint with tied scales in GPTQ's 4-bit format, without any further loss.

    Args:
        source (`str` or `Path`):
            PTQTP model folder or Hub id, quantized with `scale_mode="tied"`.
        destination, overwrite, progress:
            As in [`dequantize_checkpoint`].

    Returns:
        [`~hf_rb.evaluation.Size`]: Size of the written model.

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model.
        ValueError: The model is not quantized with PTQTP, its scales are free, it is a mixture of experts, a layer has
            sizes that the format cannot hold, the destination holds it, or a packed tensor is damaged or missing.
    """
    packed = _PackedModel(source, destination, overwrite)
    if packed.method != "ptqtp":
        raise ValueError(
            f"{source} is quantized with {packed.config.record.name}, {packed.config.record.lacks}. Write an ordinary "
            "model with `hf-rb dequantize`."
        )
    if packed.config.scale_mode != "tied":
        raise ValueError(
            f"{source} has two free scales a group, nine levels that no 4-bit grid holds. Quantize with "
            '`scale_mode="tied"` (`--scale-mode tied`) to export it, or write an ordinary model with '
            "`hf-rb dequantize`."
        )
    for name, weight in packed.weights.items():
        if len(packed.shapes[weight.parameter]) == 3:
            raise ValueError(
                f"{name} belongs to a mixture of experts; transformers loads no experts from GPTQ's format. Write an "
                "ordinary model with `hf-rb dequantize`."
            )
        if weight.transposed:
            raise ValueError(
                f"{name} belongs to a Conv1D, which few loaders of GPTQ's format know. Write an ordinary model with "
                "`hf-rb dequantize`."
            )
        if any(size % CODES_PER_WORD for size in weight.shape):
            raise ValueError(
                f"{name} is {weight.shape[0]} x {weight.shape[1]}; GPTQ packs {CODES_PER_WORD} codes a word in both "
                "directions. Leave this layer out of the quantization (`modules_to_not_convert`)."
            )
    short = [name for name, weight in packed.weights.items() if weight.shape[1] % packed.config.group_size]
    if short:
        logger.warning(
            f"The rows of {len(short)} layers ({short[0]}, …) end in a group shorter than {packed.config.group_size}. "
            "Few loaders of the format take that; transformers does with "
            '`GPTQConfig(bits=4, backend="gptq_torch")`.'
        )
    card = {
        "tags": [packed.method, "gptq", "4-bit"],
        "load_with": 'GPTQConfig(bits=4, backend="gptq_torch")' if short else None,
        "sections": {
            "Format": "GPTQ: symmetric 4-bit codes, which hold the nine levels of two tied ternary planes of PTQTP "
            f"exactly, with a scale for each group of {packed.config.group_size} weights. transformers loads it "
            "where `optimum` and `gptqmodel` are installed; it was tried with 2.3 and 7.7, on a CPU."
        },
    }
    return packed.rewrite(packed.to_gptq, packed.gptq_config(), None, overwrite, progress, card)


@dataclass(frozen=True)
class _Packed:
    """A packed tensor of the files, all or a part of `parameter`; `shape` is that of the weight it stands for."""

    parameter: str
    layout: Layout
    shape: tuple[int, ...]
    transposed: bool


class _PackedModel:
    """A quantized checkpoint as tensors, which is to be written in another form."""

    def __init__(self, source: str | Path, destination: str | Path, overwrite: bool):
        self.source, self.destination = source, Path(destination)
        self.folder = find_packed(source, destination, overwrite)
        check_plain(self.folder)
        self.method = quantization_method(self.folder)
        stored: Any = AutoConfig.from_pretrained(self.folder)
        self.config = AutoQuantizationConfig.from_dict(stored.quantization_config)
        del stored.quantization_config
        self.model_config = stored
        self.checkpoint = Checkpoint(self.folder)
        model = skeleton(self.model_config)
        self.dtype = model.dtype
        self.linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        find = ParameterNames(model)
        quantizer = self.quantizer = AutoHfQuantizer.from_config(self.config, pre_quantized=True)
        files = [str(file) for file in self.checkpoint.files]
        quantizer.preprocess_model(model=model, dtype=self.dtype, device_map=None, checkpoint_files=files)
        self.weights: dict[str, _Packed] = {}
        for name, entry in self.checkpoint.entries.items():
            parameter = next(iter(find(name)[0]), None)
            if parameter is not None and parameter in quantizer.layouts:
                owner, layout = model.get_submodule(parameter.rpartition(".")[0]), quantizer.layouts[parameter]
                transposed = is_transposed(owner) and len(entry.shape) == len(self.shapes[parameter])
                whole = len(entry.shape) == 3 or transposed
                shape = self.shapes[parameter] if whole else (entry.shape[0], layout.in_features)
                self.weights[name] = _Packed(parameter, layout, shape, transposed)
        self._check(quantizer.layouts)

    def _check(self, parameters: Iterable[str]) -> None:
        names, found = self.checkpoint.entries, Counter()
        for name, weight in self.weights.items():
            if (scale := name + SUFFIXES["scale"]) not in names:
                raise ValueError(f"{self.source} has {name}, but no {scale}. Copy or download it again.")
            found[weight.parameter] += math.prod(weight.shape)
        for parameter in parameters:
            if found[parameter] != (expected := math.prod(self.shapes[parameter])):
                end = SUFFIXES["scale"]
                scales = (name.removesuffix(end) for name in names if name.endswith(end))
                lost = [name for name in scales if name not in names and name.startswith(parameter.rpartition(".")[0])]
                raise ValueError(
                    f"{self.source} holds {found[parameter]:,} of the {expected:,} weights of {parameter}"
                    + (f"; {lost[0]} is missing, its scales are there" if lost else "")
                    + ". Copy or download it again."
                )

    def read(self, name: str, function: Callable[[PackedWeight], Tensor]) -> Tensor:
        """Returns what `function` makes of a packed weight of the files, which is checked and in the form of
        memory.
        """
        entries, names = self.checkpoint.entries, [name + suffix for suffix in ("", *self.quantizer.suffixes)]
        tensors = {one: entries[one].read() for one in names if one in entries}
        try:
            stored = PackedWeight.collect(name, tensors.get)
            return function(self.quantizer.restore(self.weights[name].parameter, stored))
        except ValueError as error:
            raise ValueError(f"{name}{getattr(error, 'suffix', '')}: {error}") from error

    def rewrite(
        self,
        convert: Callable[[str], dict[str, Output]],
        quantization_config: dict | None,
        dtype: torch.dtype | None,
        overwrite: bool,
        progress: bool,
        card: Mapping[str, Any] = MappingProxyType({}),
    ) -> Size:
        """
        Writes the checkpoint again with `convert(name)` in the place of packed tensors and `dtype` for the others.
        `card` are more fields of its [`~hf_rb.hub.ModelCardData`].
        """
        beside = {name + suffix for name in self.weights for suffix in self.quantizer.suffixes}
        total = sum(entry.nbytes for entry in self.checkpoint.entries.values())
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="write", disable=None if progress else True)
        names = standard_names(len(self.checkpoint.files))
        with atomic_folder(self.destination, overwrite) as folder, bar, torch.inference_mode():
            for file, shard in zip(names, self.checkpoint.shards, strict=True):
                outputs: dict[str, Output] = {}
                for name, entry in shard.items():
                    if name in self.weights:
                        outputs |= convert(name)
                    elif name not in beside:
                        outputs[name] = Output.copy(entry, dtype if entry.dtype.is_floating_point else None)
                write_tensors(folder / file, outputs)
                bar.update(sum(entry.nbytes for entry in shard.values()))
            if len(names) > 1:
                write_index(folder, names)
            self.model_config.dtype = dtype or self.dtype
            self.model_config.save_pretrained(folder)
            if quantization_config:
                config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                text = json.dumps(config | {"quantization_config": quantization_config}, indent=2) + "\n"
                (folder / "config.json").write_text(text, encoding="utf-8")
            copy_companions(self.folder, folder)
            size = model_size(folder)
            origin, method = read_origin(self.folder) or "the original model", self.config.record.name
            values = (
                f"The weights have the values that quantizing {origin} with {method} has left, and no better ones."
            )
            card = {"tags": [self.method], **card, "sections": {"Values": values, **card.get("sections", {})}}
            data = ModelCardData(self.destination.name, base_model=str(self.source), size=size, **card)
            write_model_card(folder, data)
        return size

    def to_gptq(self, name: str) -> dict[str, Output]:
        weight = self.weights[name]
        (rows, columns), groups = weight.shape, weight.layout.groups
        module = name.removesuffix(".weight")

        def qweight() -> Iterator[Tensor]:
            packed = self.read(name, lambda stored: stored.packed)
            words = torch.empty(columns // CODES_PER_WORD, rows, dtype=torch.int32)
            for block in row_blocks(rows, columns):
                (codes,) = unpack(packed[block], weight.layout)  # 3 (t_1 + 1) + (t_2 + 1) = c + 4
                words[:, block] = _pack_words(codes.T.to(torch.int32) + (ZERO_POINT - 4))
            yield words.view(-1)

        def scales() -> Iterator[Tensor]:
            yield self.read(name, lambda stored: stored.scale)[..., 1].T.contiguous().view(-1)

        zeros = _pack_words(torch.full((CODES_PER_WORD, 1), ZERO_POINT - 1, dtype=torch.int32))
        group = torch.arange(columns, dtype=torch.int32) // self.config.group_size
        return {
            f"{module}.qweight": Output(torch.int32, (columns // CODES_PER_WORD, rows), qweight),
            f"{module}.qzeros": Output.of(zeros.expand(groups, rows // CODES_PER_WORD)),
            f"{module}.scales": Output(torch.float16, (groups, rows), scales),
            f"{module}.g_idx": Output.of(group),
        }

    def gptq_config(self) -> dict:
        """Returns the entry of `config.json` that GPTQ's loaders read."""
        config = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.config.group_size,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "meta": {"quantizer": ["hf_rb:ptqtp"]},
        }
        packed = {name.removesuffix(".weight") for name in self.weights}
        blocks = [match[0] for name in packed if (match := re.match(r".*?\.\d+\.", name))]
        kept = [name for name in self.linear if name not in packed and name.startswith(tuple(blocks))]
        if kept:
            # Within the blocks that the loaders replace as a whole, for optimum the layers to replace, for others
            # those to leave.
            config["modules_in_block_to_quantize"] = [sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in packed})]
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in kept}
        return config


def _pack_words(codes: Tensor) -> Tensor:
    """Packs int32 codes from 0 to 15, eight neighbours of the first dimension a word, the first in the lowest bits."""
    words = torch.zeros(len(codes) // CODES_PER_WORD, *codes.shape[1:], dtype=torch.int32)
    for place in range(CODES_PER_WORD):
        words |= codes[place::CODES_PER_WORD] << (4 * place)
    return words
