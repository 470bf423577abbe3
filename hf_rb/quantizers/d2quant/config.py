"""The configuration of D²Quant, importable without its maths and without torch."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

from transformers.utils import logging

from hf_rb.io.data_files import text_problem
from hf_rb.methods import Paper, QuantizerMethod, flag
from hf_rb.quantizers.config import PackedConfig
from hf_rb.utils.fields import documented


__all__ = ["D2QuantConfig", "text_fingerprint"]

# Fields that act only where another one has a certain value, with the defaults that are silent elsewhere.
_ACTS_ONLY = {
    "asym_alpha": (0.25, "backend", ("gptaq",)),
    "percdamp": (0.01, "backend", ("gptaq", "gptq")),
    "act_order": ("gar", "backend", ("gptaq", "gptq")),
    "dsq_iters": (15, "dsq", (True,)),
    "dsq_weighting": ("hessian", "dsq", (True,)),
    "dac_mode": ("fold", "dac", (True,)),
    "dac_clip": (10.0, "dac", (True,)),
    "dac_final": (True, "dac", (True,)),
    "rotation_block": ("auto", "rotate", ("block_hadamard",)),
    "rotation_seed": (0, "rotate", ("block_hadamard",)),
}


def _rules(config: Any) -> Iterator[str]:
    block = config.rotation_block
    if block != "auto" and not (type(block) is int and block > 0 and block & (block - 1) == 0):
        yield f"`rotation_block` must be 'auto' or a power of two such as 64; got {block!r}."
    for name, (default, other, values) in _ACTS_ONLY.items():
        if other in ("dac", "rotate") and config.backend == "rtn":  # which has neither, whatever the config says
            other, values = "backend", ("gptaq", "gptq")
        if getattr(config, name) != default and getattr(config, other) not in values:
            needed = " or ".join(f"`{other}={value!r}`" for value in values)
            yield f"`{name}={getattr(config, name)!r}` cannot act: it needs {needed}."
    data = config.dataset
    if isinstance(data, Sequence) and not isinstance(data, str):
        if not data or not all(isinstance(text, str) for text in data):
            yield (
                "`dataset` as a list must hold texts, at least one; an item that is no `str`, or none at all, was "
                "found."
            )
    elif not isinstance(data, (str, NoneType)):
        yield f"`dataset` must be a name, a file or a list of texts; got {type(data).__name__}."
    if data in (None, "") and config.backend != "rtn" and not config.dequantize:
        yield (
            f"D²Quant with `backend={config.backend!r}` needs calibration text: write `dataset='texts.jsonl'`, a "
            "dataset of the Hub or a list of texts; or `backend='rtn'`, which needs none."
        )


def _recipe_rules(config: Any) -> Iterator[str]:
    # Only here: a saved model keeps the name of a text that need not be where it is loaded.
    if isinstance(config.dataset, str) and config.backend != "rtn":
        yield from filter(None, [text_problem("dataset", config.dataset)])


METHOD = QuantizerMethod(
    key="d2quant",
    name="D²Quant",
    paper=Paper(
        "2602.02546",
        "D²Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs",
        "Xianglong Yan, Chengzhu Bao, Zhiteng Li, Tianao Zhang, Shaoqiu Zhang, Ruobing Xie, Xingwu Sun, Yulun Zhang",
    ),
    summary="Quantization to 2 or 3 bits, with a second, absorbed scale for the columns of down projections "
    "and, where it is calibrated on text, a correction of the mean shift behind attention.",
    config="hf_rb.quantizers.d2quant.config:D2QuantConfig",
    quantizer="hf_rb.quantizers.d2quant.quantizer:D2QuantQuantizer",
    unit="bits",
    units=(2, 3, 4),
    nsds=(2, 4),
    rules=_rules,
    recipe_rules=_recipe_rules,
    uncalibrated={"backend": "rtn"},
    memory_bits=lambda config: config.bits + 24 / config.group_size,
    trial={"bits": 3},
    written=("bias_modules", "column_modules"),
    lacks="whose sign planes and corrections GPTQ's format does not have",
)

logger = logging.get_logger(__name__)


@documented
@dataclass(repr=False)
class D2QuantConfig(PackedConfig):
    """
    Configuration of D²Quant, weight-only quantization to 2 and 3 bits (https://huggingface.co/papers/2602.02546).

    The layers are quantized one after the other on calibration text: by GPTQ or GPTAQ with an integer grid for each
    group of weights, and the down projections of the MLPs by sums of two (2 bits) or three (3 bits) sign planes with a
    second scale for each column (DSQ), which is absorbed into the up projection and costs nothing. What the quantized
    attention shifts the mean of the MLP's input by is put back as a bias (DAC). With `backend="rtn"` no data is
    needed: weights are rounded while the model loads, mixtures of experts included.

    Raises:
        ValueError: There is no calibration data, a value has the wrong type, is out of range, cannot act with the
            others or is no regular expression, or the checkpoint was written in a newer format.
    """

    record: ClassVar[QuantizerMethod] = METHOD

    # pyrefly: ignore[bad-override]  (transformers has an enumeration of its own methods)
    quant_method: str = flag("d2quant", "The method's name.", choices=("d2quant",))
    bits: int = flag(2, "Bits of a code: 2 or 3 (the paper), or 4, at which there is no DSQ.", choices=(2, 3, 4))
    group_size: int = flag(
        128,
        "Neighbouring weights of a row that share their scales. A short last group is solved on its true length.",
        range="[1, inf)",
    )
    backend: str = flag(
        "gptaq",
        "`gptq`; `gptaq`, which also corrects what the layers before have changed in a layer's input; or `rtn`, "
        "round to nearest without data, which switches `dac` and `rotate` off.",
        choices=("gptaq", "gptq", "rtn"),
    )
    dsq: bool = flag(
        True, "Whether down projections of 2 and 3 bits get sign planes and column scales instead of the integer grid."
    )
    dsq_iters: int = flag(15, "Iterations of the alternating fit of planes and scales.", range="[1, inf)")
    dsq_weighting: str = flag(
        "hessian",
        "What a column counts in that fit. `none`: all alike, as in the paper and its code. `hessian`, which is "
        "ours: by what its error costs in the output, 1 / U[j, j]^2 of the GPTQ loop's factor U of the inverse "
        'Hessian. With `backend="rtn"` there is no Hessian, and all count alike.',
        choices=("none", "hessian"),
    )
    dac: bool = flag(True, "Whether the mean shift after the quantized attention is corrected.")
    dac_mode: str = flag(
        "fold",
        "`fold` puts the correction into biases of the layers that read it; `norm_bias` into a bias of the norm.",
        choices=("fold", "norm_bias"),
    )
    dac_clip: float = flag(10.0, "Largest absolute value of a correction.", range="(0, inf)")
    dac_final: bool = flag(True, "Whether the final norm gets a correction too, as in the released code.")
    rotate: str | bool = flag(
        "block_hadamard",
        "Rotates the hidden state by a random block Hadamard matrix, which changes no output before quantization "
        "and spreads outliers. Tied embeddings are untied, which makes the file larger. `False` leaves the model "
        "as it is.",
        choices=("block_hadamard", False),
    )
    rotation_block: int | str = flag(
        "auto", "Width of a block, a power of two that divides the hidden size; `auto` is the largest up to 128."
    )
    rotation_seed: int = flag(0, "Seed of the signs in the rotation.", range="[0, inf)")
    clip_search: bool = flag(
        True, "Whether the range of each group's integer grid is searched for the smallest error."
    )
    percdamp: float = flag(
        0.01,
        "What is added to the diagonal of a Hessian, as a part of its mean. Raised, with a warning, where it does "
        "not do.",
        range="(0, inf)",
    )
    asym_alpha: float = flag(0.25, "Strength of GPTAQ's term; 0 is GPTQ.", range="[0, 1]")
    act_order: str | None = flag(
        "gar",
        "`gar` takes columns with large Hessians first without leaving their groups; `None` goes from left to right.",
        choices=("gar", None),
    )
    dataset: str | list[str] | None = flag(
        None,
        "Calibration text: a text file, a JSON-lines file with the column `text`, a dataset of the Hub (`NAME` or "
        "`NAME:CONFIG`, split `train`), `tiny:math`, a list of texts, or one of `wikitext2`, `c4` and `c4-new`, "
        'which optimum loads and draws from as it does for GPTQ. Required unless `backend="rtn"`. Of a list only'
        " the fingerprint is stored, of a file only its name.",
    )
    tokenizer: str | None = flag(None, "Tokenizer for the text; by default that of the model. Not stored.")
    num_samples: int = flag(128, "Sequences of calibration text.", range="[1, inf)")
    seqlen: int = flag(2048, "Tokens of a sequence.", range="[2, inf)")
    batch_size: int = flag(1, "Sequences that go through a layer at a time.", range="[1, inf)")
    seed: int = flag(0, "Seed of the choice of sequences.", range="[0, inf)")
    bits_per_layer: dict[str, int] | str | None = flag(
        None,
        "Bits (2, 3, 4) for modules by name, ending or regular expression, instead of `bits`; the first match "
        "counts. `nsds:3.0` gives the layers whose weights look most sensitive 4 bits and the others 2, 3 on "
        "average (https://huggingface.co/papers/2603.17354); what each layer got is stored in its place.",
    )
    resume_dir: str | None = flag(
        None,
        "Folder of its own that keeps every finished layer: a run that was killed goes on behind the last one, and"
        " a run with another model, text or configuration is refused. Delete it when the model is saved; `hf-rb "
        "quantize` chooses one and does that itself. Not stored.",
    )
    bias_modules: list[str] | None = flag(None, "Written by quantizing: the modules that got a bias.")
    column_modules: list[str] | None = flag(
        None,
        "Written by quantizing: the down projections whose column scales are stored, because no layer can absorb "
        "them.",
    )

    def __post_init__(self):
        super().__post_init__()
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
    def idle(self) -> tuple[str, ...]:  # pyrefly: ignore[bad-override]  (no constant here)
        """Fields without effect, which a model card does not show."""
        return () if self.calibrated else ("dac", "rotate", "dataset", "num_samples", "seqlen", "batch_size", "seed")

    @property
    def summary(self) -> str:
        """Sentence about the quantization of a model."""
        how = (
            f"Calibrated quantization by {self.backend.upper()}" if self.calibrated else "Rounding without calibration"
        )
        by_layer = self.bits_per_layer or {}
        widths = sorted(METHOD.nsds or () if isinstance(by_layer, str) else {self.bits, *by_layer.values()})
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
