"""Quantizes a model on calibration text, one decoder layer after the other.

Two streams of hidden states run through the layers: the original model's, and that of the model whose earlier layers
are quantized. In a layer, the linear layers that read the same tensor form a group, in the order in which they run:
query, key and value; the output projection; gate and up; down. A group is quantized on what it reads in the second
stream, with everything before it already quantized. Which modules form a group, and where the mean shift is corrected
(before the last but one), is seen by watching the layer run, not known by names.

The streams are kept on the CPU in the model's type, and a layer computes in float32 where its weights are. With T
tokens of calibration text, hidden size H and intermediate size I, the work needs beside the model about

    T x (7 H + I) numbers of the model's type     two streams, what the groups read in the original model, teacher and
                                                  student of the mean shift; 2 H without `dac` and with
                                                  `backend="gptq"`, where only streams are kept
    4 bytes x (6 I^2 + weights of a layer)        Hessian, cross matrix and their factors for the down projection; a
                                                  layer in float32

or, for a moment while it rotates, 8 bytes for each number of the embeddings; tied embeddings are two afterwards.
Folding the correction of the final norm takes 4 bytes for each number of the head, for a moment in the last layer.
`model_cards/d2quant.md` has these beside what was measured.
"""

import copy
import hashlib
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_rb import __version__
from hf_rb.io.resumable import LOCK, STATE, unfinished
from hf_rb.quantizers.d2quant.calibrate.block import Block, Decoder
from hf_rb.quantizers.d2quant.calibrate.checks import warn_of_few
from hf_rb.quantizers.d2quant.calibrate.kept import LayerResult, load_result, save_result
from hf_rb.quantizers.d2quant.calibrate.placing import name_of, put_in_place
from hf_rb.quantizers.d2quant.calibrate.streams import Streams
from hf_rb.quantizers.d2quant.calibrate.text import calibration_tokens, load_tokenizer, token_fingerprint
from hf_rb.quantizers.d2quant.config import D2QuantConfig
from hf_rb.quantizers.d2quant.format import Coding
from hf_rb.quantizers.d2quant.maths import absorption, gptq, rotation
from hf_rb.quantizers.d2quant.maths.dac import MeanShift
from hf_rb.quantizers.d2quant.maths.dsq import DualCodes
from hf_rb.quantizers.d2quant.maths.grids import AffineCodes
from hf_rb.quantizers.packed.baseline import rtn
from hf_rb.quantizers.packed.report import BlockReport, LayerReport, Report
from hf_rb.utils.progress import tqdm


__all__ = ["quantize_model"]

logger = logging.get_logger(__name__)

LAYER_FILE = "layer-{:05}.safetensors"
OURS = (LAYER_FILE.partition("{")[0], STATE, LOCK)  # what names in a folder of unfinished work begin with


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel,
    config: D2QuantConfig,
    codings: dict[str, Coding],
    report: Report,
) -> None:
    """
    Quantizes a model in place.

    Linear layers become [`D2QuantLinear`], `config.bias_modules` and `config.column_modules` say what a file of the
    model has besides.

    Args:
        model (`transformers.PreTrainedModel`):
            Decoder in memory, in 16 or 32 bits.
        config ([`D2QuantConfig`]):
            How, with `backend` `"gptq"` or `"gptaq"`.
        codings (`dict[str, Coding]`):
            Full names of what is to be quantized, each with its bits and whether it gets dual scales.
        report ([`~hf_rb.quantizers.Report`]):
            Is filled in.

    Raises:
        FileNotFoundError: There is no such calibration file.
        ValueError: Weights are not in memory, the calibration text is empty or too short, an activation is not finite,
            a Hessian cannot be factored, or unfinished work in `config.resume_dir` is of another run.
    """
    _check_loaded(model)
    tokens = calibration_tokens(config, load_tokenizer(config, model), report)
    embeddings: Any = model.get_input_embeddings()
    if (largest := int(tokens.max())) >= (rows := embeddings.num_embeddings):
        raise ValueError(
            f"The calibration text has the token id {largest}, and the model's embeddings {rows} rows: give the "
            "model's own `tokenizer`."
        )
    warn_of_few(tokens.numel(), model, codings)
    training = model.training
    model.eval()
    with _unfinished(model, config, tokens) as folder:
        if config.rotate:
            rotation.fuse_and_rotate(model, block=config.rotation_block, seed=config.rotation_seed)
        _Calibration(model, config, codings, report, tokens, folder).run()
    config.column_modules = absorption.absorb(model) or None
    model.train(training)


def _check_loaded(model: PreTrainedModel) -> None:
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{missing[0]} is not in memory, and calibration runs the model. Load it without offloading to disk: "
            "leave out `device_map` or give it more memory; or use `backend='rtn'`, which quantizes while it loads."
        )


@contextmanager
def _unfinished(model: PreTrainedModel, config: D2QuantConfig, tokens: Tensor) -> Generator[Path | None]:
    """Yields the folder for finished layers, if there is to be one."""
    if config.resume_dir is None:
        yield None
        return
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    options = {name: value for name, value in config.to_dict().items() if name not in config.record.written}
    options |= {"hf_rb": __version__, "calibration tokens": token_fingerprint(tokens)}
    state = {"files": {"the model": digest.hexdigest()}, "options": options}
    folder = Path(config.resume_dir)
    if folder.is_dir() and (others := [path.name for path in folder.iterdir() if not path.name.startswith(OURS)]):
        raise ValueError(
            f"`resume_dir={config.resume_dir!r}` holds {others[0]}, which is no unfinished work. Give a folder of "
            "its own."
        )
    with unfinished(folder, state, True, logger):
        yield folder


class _Calibration:
    """One run over a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: D2QuantConfig,
        codings: dict[str, Coding],
        report: Report,
        tokens: Tensor,
        folder: Path | None,
    ):
        self.model, self.config, self.codings, self.report, self.folder = model, config, codings, report, folder
        self.decoder = Decoder(model)
        self.streams = Streams(self.decoder, tokens, config.batch_size)
        self.final_teacher: list[Tensor] = []
        self.bias_modules: list[str] = []
        self.uncorrected: list[str] = []
        outside = [name for name in codings if not name.startswith(f"{self.decoder.name}.")]
        if outside:  # projections beside the layers: nothing is calibrated there, and a reload has to know
            report.skipped += outside
            config.modules_to_not_convert = [*(config.modules_to_not_convert or []), *outside]

    def run(self) -> None:
        bar = tqdm(range(len(self.decoder.layers)), desc="quantize", unit="layer", disable=None)
        for index in bar:
            result = self._layer(index)
            for layer in result.layers:
                self.report.add(layer, result.seconds / len(result.layers))
            self.report.blocks.append(result.block)
            self.report.final_norm = result.final
            bar.set_postfix_str(f"error {result.block.hidden_error:.3f}", refresh=False)
            logger.info(str(result.block))
        if self.uncorrected:
            logger.warning(
                f"`dac=True` corrects nothing in {len(self.uncorrected)} layers ({self.uncorrected[0]}, …): no "
                "linear layers of an MLP read the hidden state behind the attention there."
            )
        if self.config.dac and self.config.dac_final and self.decoder.final_norm is None:
            logger.warning(
                "`dac_final=True` corrects nothing: there is no norm right between the last layer and a head."
            )
        self.config.bias_modules = self.bias_modules or None

    def _layer(self, index: int) -> LayerResult:
        file = self.folder and self.folder / LAYER_FILE.format(index)
        block = self.decoder.block(index)
        last = index == len(self.decoder.layers) - 1
        try:
            readings = self._observe(block)
            shifted = self._shifted(list(readings))
            if self.config.dac and shifted is None:
                self.uncorrected.append(block.name)
            norm = self._norm_to_shift(block, shifted[0]) if shifted else None
            if file and file.is_file():
                result = load_result(file, block.device)
                self._install(block, result.codes)
                if result.shift is not None:
                    block.shift(cast(tuple[str, ...], shifted), result.shift, norm)  # no shift without readers
                self.streams.advance(block)
            else:
                result = self._solve(block, readings, shifted, norm, last)
                result.block.hidden_error = self.streams.advance(block)
                if self.final_teacher:
                    result.final_shift, result.final = self._final_shift()
                if file:
                    save_result(result, file)
        finally:
            block.close()
        self.bias_modules += put_in_place(self.model, self.decoder.final_norm, self.config, result, shifted, norm)
        return result

    def _observe(self, block: Block) -> dict[tuple[str, ...], list[Tensor]]:
        """Runs the original layer; returns which groups there are, and what they read if that is needed."""
        readings = self.streams.observe(block, keep=self.config.backend == "gptaq")
        idle = [name for name in block.linear if name in self.codings and not any(name in names for names in readings)]
        if idle:
            raise ValueError(f"{idle[0]} reads no calibration text. Add it to `modules_to_not_convert`.")
        return readings

    def _shifted(self, groups: list[tuple[str, ...]]) -> tuple[str, ...] | None:
        # query, key, value; output; gate, up; down: what reads the hidden state behind the attention is the last but
        # one.
        return groups[-2] if self.config.dac and len(groups) >= 4 else None

    def _norm_to_shift(self, block: Block, reader: str) -> str | None:
        """Returns the norm that is to keep the correction, or `None` where it is folded into those that read it."""
        if self.config.dac_mode == "fold":
            return None
        if (norm := block.norm_of(reader, self.streams.quantized[0])) is None:
            logger.warning(f"What {reader} reads comes from no norm: its correction is folded into biases.")
        return norm

    def _solve(
        self,
        block: Block,
        readings: dict[tuple[str, ...], list[Tensor]],
        shifted: tuple[str, ...] | None,
        norm: str | None,
        last: bool,
    ) -> LayerResult:
        result = LayerResult(block=BlockReport(block.name))
        teacher = self.streams.inputs(block, shifted[0]) if shifted else []
        for names in list(readings):
            if names == shifted:
                student = self.streams.inputs(block, names[0])
                result.shift = mean_shift(result.block, teacher, student, self.config.dac_clip)
                block.shift(names, result.shift, norm)
                inputs: Iterable[Tensor] = (read.float() + result.shift for read in student)
                if last and self.config.dac_final and self.decoder.final_norm is not None:
                    self.final_teacher = self._final(block.run(hidden) for hidden in self.streams.quantized)
            else:
                inputs = (block.input_of(names[0], hidden) for hidden in self.streams.quantized)
            members = [name for name in names if name in self.codings]
            if not members:
                continue
            originals = readings.pop(names) or [None] * len(self.streams.quantized)
            cross = self.config.backend == "gptaq"
            statistics = gptq.InputStatistics(block.linear[members[0]].in_features, cross, block.device)
            for read, original in zip(inputs, originals, strict=True):
                statistics.add(read.to(block.device), original)
            self._quantize(block, members, statistics, result)
        return result

    def _final(self, outputs: Iterable[Tensor]) -> list[Tensor]:
        # In float32 as the layers; a LayerNorm takes no mixture of types.
        norm = copy.deepcopy(cast(nn.Module, self.decoder.final_norm)).float()
        outputs = (output.to(next(norm.parameters(), output).device, torch.float32) for output in outputs)
        return [self.streams.keep(norm(output), "The final norm's output") for output in outputs]

    def _final_shift(self) -> tuple[Tensor, BlockReport]:
        report = BlockReport(name_of(self.model, cast(nn.Module, self.decoder.final_norm)))
        student = self._final(self.streams.quantized)
        return mean_shift(report, self.final_teacher, student, self.config.dac_clip), report

    def _quantize(self, block: Block, names: list[str], statistics: gptq.InputStatistics, result: LayerResult) -> None:
        start = time.perf_counter()
        for together in self._stacks(names):
            bits, dual = self.codings[together[0]]
            weights = [block.linear[name].weight.detach() for name in together]
            try:
                codes, stats = gptq.quantize(
                    torch.cat(weights),
                    statistics.hessian,
                    statistics.cross,
                    bits=bits,
                    group_size=self.config.group_size,
                    act_order=self.config.act_order,
                    percdamp=self.config.percdamp,
                    asym_alpha=self.config.asym_alpha,
                    dual=dual,
                    dsq_iters=self.config.dsq_iters,
                    dsq_weighting=self.config.dsq_weighting,
                    clip_search=self.config.clip_search,
                )
            except ValueError as error:
                raise ValueError(f"{', '.join(together)}: {error}") from error
            if stats.percdamp > self.config.percdamp:
                logger.warning(f"The Hessian of {', '.join(together)} needed `percdamp={stats.percdamp:.3g}`.")
            parts = _split(codes, [len(weight) for weight in weights])
            for name, weight, part in zip(together, weights, parts, strict=True):
                error = ((part.dequantize() - weight).norm() / weight.norm().clamp_(min=1e-30)).item()
                result.layers.append(LayerReport(name, weight.numel(), error, False, *rtn(weight)))
                result.codes[name] = part
        result.seconds += time.perf_counter() - start
        self._install(block, {name: result.codes[name] for name in names})

    def _stacks(self, names: list[str]) -> list[list[str]]:
        """Matrices that are quantized as one: of the same bits, but each with column scales of its own."""
        stacks: dict[Any, list[str]] = {}
        for name in names:
            bits, dual = self.codings[name]
            stacks.setdefault(name if dual else bits, []).append(name)
        return list(stacks.values())

    def _install(self, block: Block, codes: dict[str, AffineCodes | DualCodes]) -> None:
        for name, part in codes.items():
            block.linear[name].weight.data.copy_(part.dequantize())


def mean_shift(report: BlockReport, teacher: list[Tensor], student: list[Tensor], clip: float) -> Tensor:
    """Returns the mean shift `(hidden,)`, at most `clip`, and writes into the report what it does on the same text."""
    lost, left = (MeanShift(teacher[0].shape[-1]) for _ in range(2))
    for one, other in zip(teacher, student, strict=True):
        lost.add(one, other)
    bias = lost.bias(clip)
    for one, other in zip(teacher, student, strict=True):
        left.add(one, other.double() + bias.double())
    squares = lost.mean_square, left.mean_square, lost.mean_square_with(bias)
    report.shift_before, report.shift_after, report.shift_expected = (square.mean().item() for square in squares)
    return bias


def _split(codes: AffineCodes | DualCodes, rows: list[int]) -> list[AffineCodes | DualCodes]:
    """Takes apart what was stacked, which dual codes never are."""
    if isinstance(codes, DualCodes) or len(rows) == 1:
        return [codes]
    parts = zip(codes.codes.split(rows), codes.scale.split(rows), codes.zero.split(rows), strict=True)
    return [replace(codes, codes=one.contiguous(), scale=scale, zero=zero) for one, scale, zero in parts]
