"""The configuration of D²Quant, importable without its maths and without torch."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils import logging

from hf_rb.quantizers.config import FORMAT_VERSION, PackedConfig
from hf_rb.quantizers.rules import NSDS_RANGES, d2quant_rules
from hf_rb.utils.fields import described, validate


__all__ = ["D2QuantConfig", "text_fingerprint"]

logger = logging.get_logger(__name__)


@dataclass(repr=False)
class D2QuantConfig(PackedConfig):
    """
    Configuration of D²Quant, weight-only quantization to 2 and 3 bits (https://huggingface.co/papers/2602.02546).

    The layers are quantized one after the other on calibration text: by GPTQ or GPTAQ with an integer grid for each
    group of weights, and the down projections of the MLPs by sums of two (2 bits) or three (3 bits) sign planes with a
    second scale for each column (DSQ), which is absorbed into the up projection and costs nothing. What the quantized
    attention shifts the mean of the MLP's input by is put back as a bias (DAC). With `backend="rtn"` no data is
    needed: weights are rounded while the model loads, mixtures of experts included.

    Args:
        bits (`int`, *optional*, defaults to `2`):
            Bits of a code: 2 or 3 (the paper), or 4, at which there is no DSQ.
        group_size (`int`, *optional*, defaults to `128`):
            Neighbouring weights of a row that share their scales. A short last group is solved on its true length.
        backend (`str`, *optional*, defaults to `"gptaq"`):
            `"gptq"`; `"gptaq"`, which also corrects what the layers before have changed in a layer's input; or
            `"rtn"`, round to nearest without data, which switches `dac` and `rotate` off.
        dsq (`bool`, *optional*, defaults to `True`):
            Whether down projections of 2 and 3 bits get sign planes and column scales instead of the integer grid.
        dsq_iters (`int`, *optional*, defaults to `15`):
            Iterations of the alternating fit of planes and scales.
        dsq_weighting (`str`, *optional*, defaults to `"hessian"`):
            What a column counts in that fit. `"none"`: all alike, as in the paper and its code. `"hessian"`, which is
            ours: by what its error costs in the output, 1 / U[j, j]^2 of the GPTQ loop's factor U of the inverse
            Hessian. With `backend="rtn"` there is no Hessian, and all count alike.
        dac (`bool`, *optional*, defaults to `True`):
            Whether the mean shift after the quantized attention is corrected.
        dac_mode (`str`, *optional*, defaults to `"fold"`):
            `"fold"` puts the correction into biases of the layers that read it; `"norm_bias"` into a bias of the norm.
        dac_clip (`float`, *optional*, defaults to `10.0`):
            Largest absolute value of a correction.
        dac_final (`bool`, *optional*, defaults to `True`):
            Whether the final norm gets a correction too, as in the released code.
        rotate (`str` or `False`, *optional*, defaults to `"block_hadamard"`):
            Rotates the hidden state by a random block Hadamard matrix, which changes no output before quantization and
            spreads outliers. Tied embeddings are untied, which makes the file larger. `False` leaves the model as it
            is.
        rotation_block (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Width of a block, a power of two that divides the hidden size; `"auto"` is the largest up to 128.
        rotation_seed (`int`, *optional*, defaults to `0`):
            Seed of the signs in the rotation.
        clip_search (`bool`, *optional*, defaults to `True`):
            Whether the range of each group's integer grid is searched for the smallest error.
        percdamp (`float`, *optional*, defaults to `0.01`):
            What is added to the diagonal of a Hessian, as a part of its mean. Raised, with a warning, where it does
            not do.
        asym_alpha (`float`, *optional*, defaults to `0.25`):
            Strength of GPTAQ's term; 0 is GPTQ.
        act_order (`str` or `None`, *optional*, defaults to `"gar"`):
            `"gar"` takes columns with large Hessians first without leaving their groups; `None` goes from left to
            right.
        dataset (`str` or `list[str]`, *optional*):
            Calibration text: a text file, a JSON-lines file with the column `text`, a dataset of the Hub (`NAME` or
            `NAME:CONFIG`, split `train`), `"tiny:math"`, a list of texts, or one of `"wikitext2"`, `"c4"` and
            `"c4-new"`, which optimum loads and draws from as it does for GPTQ. Required unless `backend="rtn"`. Of a
            list only the fingerprint is stored, of a file only its name.
        tokenizer (`str` or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer for the text; by default that of the model. Not stored.
        num_samples (`int`, *optional*, defaults to `128`):
            Sequences of calibration text.
        seqlen (`int`, *optional*, defaults to `2048`):
            Tokens of a sequence.
        batch_size (`int`, *optional*, defaults to `1`):
            Sequences that go through a layer at a time.
        seed (`int`, *optional*, defaults to `0`):
            Seed that chooses the sequences.
        bits_per_layer (`dict[str, int]` or `str`, *optional*):
            Bits (2, 3, 4) for modules by name, ending or regular expression, instead of `bits`; the first match
            counts. `"nsds:3.0"` gives the layers whose weights look most sensitive 4 bits and the others 2, 3 on
            average (https://huggingface.co/papers/2603.17354); what each layer got is stored in its place.
        modules_to_not_convert (`list[str]`, *optional*):
            Names, endings or regular expressions of modules to leave as they are, besides those that are never
            quantized, as in [`PTQTPConfig`].
        resume_dir (`str`, *optional*):
            Folder of its own that keeps every finished layer: a run that was killed goes on behind the last one, and a
            run with another model, text or configuration is refused. Delete it when the model is saved;
            `hf-rb quantize` chooses one and does that itself. Not stored.
        dequantize (`bool`, *optional*, defaults to `False`):
            For loading a D²Quant checkpoint: turn it into ordinary layers. Not stored.
        bias_modules (`list[str]`, *optional*):
            Written by quantizing: the modules that got a bias.
        column_modules (`list[str]`, *optional*):
            Written by quantizing: the down projections whose column scales are stored, because no layer can absorb
            them.

    Raises:
        ValueError: There is no calibration data, a value has the wrong type, is out of range, cannot act with the
            others or is no regular expression, or the checkpoint was written in a newer format.
    """

    method: ClassVar[str] = "D²Quant"
    written: ClassVar[tuple[str, ...]] = ("bias_modules", "column_modules")

    bits: int = field(default=2, metadata=described("Bits of a code.", choices=(2, 3, 4)))
    group_size: int = field(
        default=128, metadata=described("Weights of a row that share their scales.", range="[1, inf)")
    )
    backend: str = field(
        default="gptaq", metadata=described("How weights are rounded.", choices=("gptaq", "gptq", "rtn"))
    )
    dsq: bool = field(default=True, metadata=described("Dual scales for down projections of 2 and 3 bits."))
    dsq_iters: int = field(default=15, metadata=described("Iterations of the fit of dual scales.", range="[1, inf)"))
    dsq_weighting: str = field(
        default="hessian", metadata=described("What columns count in the fit.", choices=("none", "hessian"))
    )
    dac: bool = field(default=True, metadata=described("Correct the mean shift after attention."))
    dac_mode: str = field(
        default="fold", metadata=described("Where corrections are kept.", choices=("fold", "norm_bias"))
    )
    dac_clip: float = field(default=10.0, metadata=described("Largest correction.", range="(0, inf)"))
    dac_final: bool = field(default=True, metadata=described("Correct the mean shift of the final norm too."))
    rotate: str | bool = field(
        default="block_hadamard",
        metadata=described("Rotation of the hidden state.", choices=("block_hadamard", False)),
    )
    rotation_block: int | str = field(default="auto", metadata=described("Width of a block of the rotation."))
    rotation_seed: int = field(default=0, metadata=described("Seed of the rotation.", range="[0, inf)"))
    clip_search: bool = field(default=True, metadata=described("Search the range of each group's grid."))
    percdamp: float = field(default=0.01, metadata=described("Damping of Hessians.", range="(0, inf)"))
    asym_alpha: float = field(default=0.25, metadata=described("Strength of GPTAQ's term.", range="[0, 1]"))
    act_order: str | None = field(default="gar", metadata=described("Order of columns.", choices=("gar", None)))
    dataset: str | list[str] | None = field(default=None, metadata=described("Calibration text."))
    tokenizer: str | None = field(default=None, metadata=described("Tokenizer, if not that of the model."))
    num_samples: int = field(default=128, metadata=described("Sequences of calibration text.", range="[1, inf)"))
    seqlen: int = field(default=2048, metadata=described("Tokens of a sequence.", range="[2, inf)"))
    batch_size: int = field(default=1, metadata=described("Sequences that run at a time.", range="[1, inf)"))
    seed: int = field(default=0, metadata=described("Seed that chooses the sequences.", range="[0, inf)"))
    bits_per_layer: dict[str, int] | str | None = field(
        default=None, metadata=described("Bits by module name, instead of `bits`; or `nsds:` and an average.")
    )
    modules_to_not_convert: list[str] | None = field(
        default=None, metadata=described("Modules to leave as they are, besides the output embeddings.")
    )
    resume_dir: str | None = field(default=None, metadata=described("Folder for the finished layers of a run."))
    dequantize: bool = field(default=False, metadata=described("Load a D²Quant checkpoint as ordinary linear layers."))
    bias_modules: list[str] | None = field(default=None, metadata=described("Written by quantizing."))
    column_modules: list[str] | None = field(default=None, metadata=described("Written by quantizing."))
    # pyrefly: ignore[bad-override]  (transformers has an enumeration of its own methods)
    quant_method: str = field(default="d2quant", metadata=described("The method's name.", choices=("d2quant",)))
    format_version: int = field(default=FORMAT_VERSION, metadata=described("Version of the file format."))

    def __post_init__(self):
        super().__post_init__()
        validate(self, d2quant_rules)
        if self.calibrated:
            return
        idle = {"dac": False, "rotate": False, "dataset": None}
        switched_off = [name for name, off in idle.items() if getattr(self, name) != off]
        for name in switched_off:
            setattr(self, name, idle[name])
        if switched_off:
            names = " and ".join(f"`{name}`" for name in switched_off)
            logger.warning(f"D²Quant with `backend='rtn'` sees no data and no whole model: {names} switched off.")

    @property
    def calibrated(self) -> bool:  # pyrefly: ignore[bad-override]  (no constant here)
        """Returns whether the model is run on text to quantize it."""
        return self.backend != "rtn"

    @property
    def idle(self) -> tuple[str, ...]:
        """Fields without effect, which a model card does not show."""
        return () if self.calibrated else ("dac", "rotate", "dataset", "num_samples", "seqlen", "batch_size", "seed")

    @property
    def summary(self) -> str:
        """Sentence about the quantization of a model."""
        how = (
            f"Calibrated quantization by {self.backend.upper()}" if self.calibrated else "Rounding without calibration"
        )
        by_layer = self.bits_per_layer or {}
        widths = sorted(
            NSDS_RANGES["bits_per_layer"] if isinstance(by_layer, str) else {self.bits, *by_layer.values()}
        )
        columns = "a second scale for the columns of down projections, absorbed where that is exact,"
        parts = [columns] * (self.dsq and widths[0] < 4)
        parts += ["a correction of the mean shift behind attention"] * self.dac
        more = f", with {' and '.join(parts).rstrip(',')}" if parts else ""
        return f"{how} to {' and '.join(map(str, widths))} bits{more}."

    def to_dict(self) -> dict[str, Any]:
        """Returns what is stored in `config.json`: no text, and no folder's name."""
        stored = super().to_dict()
        del stored["tokenizer"], stored["resume_dir"]
        if isinstance(self.dataset, (list, tuple)):
            stored["dataset"] = text_fingerprint(self.dataset)
        elif self.dataset is not None and os.path.isfile(self.dataset):  # `Path.is_file` refuses long names
            stored["dataset"] = Path(self.dataset).name
        return stored


def text_fingerprint(texts: Sequence[str]) -> str:
    """Returns a name for a list of texts that says their number and changes with any of them."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    return f"{len(texts)} texts, sha256 {digest.hexdigest()}"
