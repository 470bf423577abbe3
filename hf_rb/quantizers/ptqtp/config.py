"""The configuration of PTQTP, importable without its solver and without torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_rb.methods import Paper, QuantizerMethod, flag
from hf_rb.quantizers.config import PackedConfig
from hf_rb.utils.fields import documented


__all__ = ["PTQTPConfig"]


def _rules(config: Any) -> Iterator[str]:
    by_layer = config.planes_per_layer
    numbers = {config.planes, *(by_layer.values() if isinstance(by_layer, dict) else ())}
    if config.scale_mode == "tied" and (isinstance(by_layer, str) or numbers != {2}):
        yield "`scale_mode='tied'` ties two scales: use it with `planes=2` and without other `planes_per_layer`."


METHOD = QuantizerMethod(
    key="ptqtp",
    name="PTQTP",
    paper=Paper(
        "2509.16989",
        "PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models",
        "He Xiao, Runming Yang, Qingyao Yang, Wendong Xu, Zhen Li, Yupeng Su, Zhengwu Liu, Hongxia Yang, Ngai Wong",
    ),
    summary="Post-training quantization, without calibration data, of every group of 128 weights to a sum of "
    "two ternary planes, each with its own scale.",
    config="hf_rb.quantizers.ptqtp.config:PTQTPConfig",
    quantizer="hf_rb.quantizers.ptqtp.quantizer:PTQTPQuantizer",
    unit="planes",
    units=(1, 2, 3),
    nsds=(2, 3),
    rules=_rules,
    memory_bits=lambda config: config.planes * (2 + 16 / config.group_size),
    solves_again=True,
)


@documented
@dataclass
class PTQTPConfig(PackedConfig):
    """
    Configuration of PTQTP, post-training quantization to trit-planes (https://huggingface.co/papers/2509.16989).

    Every layer outside the skipped ones that computes what `nn.Linear` does (a subclass, `Conv1D` of GPT-2), and the
    weight of every expert where a model keeps them in one parameter, becomes a sum of two ternary matrices with a pair
    of float16 scales for 128 weights. No calibration data is needed. These are nine levels: 3.5 bits a weight with its
    scales in the dense packing, 4.25 in the nibble packing and in memory, not the 1.58 bits of one plane. At 4.25 bits
    round-to-nearest on a 4-bit grid is the more accurate choice.

    Raises:
        ValueError: A value has the wrong type, is out of range or is no regular expression, or the checkpoint was
            written in a newer format.
    """

    record: ClassVar[QuantizerMethod] = METHOD
    loading: ClassVar[tuple[str, ...]] = ("dequantize", "activations")

    # pyrefly: ignore[bad-override]  (transformers has an enumeration of its own methods)
    quant_method: str = flag("ptqtp", "The method's name.", choices=("ptqtp",))
    group_size: int = flag(
        128,
        "Neighbouring weights of a row that share their scales. A short last group is solved on its true length.",
        range="[1, inf)",
    )
    planes: int = flag(
        2,
        "Ternary planes: 1, 2 (the paper) or 3 (27 levels, 5.25 bits a weight with its scales in the dense "
        "packing; ours).",
        choices=(1, 2, 3),
    )
    max_iter: int = flag(50, "Upper limit of iterations of the solver.", range="[1, inf)")
    tol: float = flag(1e-4, "A group of weights is done when its scales move less than this.", range="(0, inf)")
    tol_mode: str = flag(
        "absolute",
        "`absolute` is the paper's rule; a layer whose median scale is below `30 * tol`, for which that rule stops"
        " too early, is solved again with `relative` and counted in the report. `absolute_strict` never does that.",
        choices=("absolute", "relative", "absolute_strict"),
    )
    scale_mode: str = flag(
        "free",
        "`tied` keeps the first scale at three times the second: a symmetric integer code (not part of the paper).",
        choices=("free", "tied"),
    )
    multistart: bool = flag(
        False,
        "Whether a group is also solved from other starting points and the best solution is kept: some 4 % less "
        "error for about twice the time (not part of the paper).",
    )
    packing: str = flag(
        "dense",
        "Bytes in the file: `dense` (5 trits a byte) or `nibble` (two planes of a weight in 4 bits, as in memory).",
        choices=("dense", "nibble"),
    )
    quantize_qk: bool = flag(
        True, "Whether `q_proj` and `k_proj` are quantized. The paper quantizes them, its authors' checkpoints do not."
    )
    planes_per_layer: dict[str, int] | str | None = flag(
        None,
        "Planes for modules by name, ending or regular expression, instead of `planes`; the first match counts. "
        'Fused experts have the names of their parameters: `{"down_proj": 3}` holds for dense layers and '
        "experts, `up_proj` for dense layers only where the experts have `gate_up_proj`. `nsds:2.5` gives the "
        "layers whose weights look most sensitive 3 planes and the others 2, 2.5 on average (the scores of "
        "https://huggingface.co/papers/2603.17354, whose use for planes is ours); what each layer got is stored in"
        " its place.",
    )
    activations: str = flag(
        "exact",
        "`int8` rounds the input of a layer to 8 bits for each group of weights where a processor has a faster "
        "kernel for that, with a relative error of 0.65 % in the output of a layer. May be given when loading; a "
        "checkpoint that was stored with `int8` keeps it.",
        choices=("exact", "int8"),
    )

    @property
    def summary(self) -> str:
        """Sentence about the quantization of a model."""
        by_layer = self.planes_per_layer or {}
        numbers = METHOD.nsds or () if isinstance(by_layer, str) else {self.planes, *by_layer.values()}
        sums = ("one ternary plane", "a sum of two ternary planes", "a sum of three ternary planes")
        return (
            f"Post-training quantization, without calibration data, of every group of {self.group_size} weights to "
            f"{' or '.join(sums[number - 1] for number in sorted(numbers))}, each with its own scale."
        )
