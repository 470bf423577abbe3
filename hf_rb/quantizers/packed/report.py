"""Report of quantizing a model, layer by layer, beside plain 4-bit rounding."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_rb.evaluation import Size, Verdict

__all__ = ["BlockReport", "LayerAllocation", "LayerReport", "Report"]

NOT_COMPARED = "Not compared with 4-bit rounding"


@dataclass
class LayerReport:
    """
    One quantized layer.

    Attributes:
        name (`str`): Module name in the model; all experts of a layer that share a parameter have one name.
        weights (`int`): Weights in the layer.
        relative_error (`float`): Frobenius norm of the change over that of the weight, scales rounded as stored.
        resolved (`bool`): Whether the layer was solved a second time because the first stopping rule was too coarse.
        baseline_error (`float`, *optional*): Relative error of 4-bit round-to-nearest with groups of 128, on a sample
            of the rows.
        baseline_bytes (`int`, *optional*): Bytes that the layer would take then.
    """

    name: str
    weights: int
    relative_error: float
    resolved: bool = False
    baseline_error: float | None = None
    baseline_bytes: int | None = None

    @property
    def kind(self) -> str:
        """The last part of the name: `q_proj`, `down_proj`, …"""
        return self.name.rpartition(".")[2]


@dataclass
class BlockReport:
    """
    A decoder layer that was quantized on calibration text; or the final norm, of which there are only the last three
    numbers.

    Attributes:
        name (`str`): Module name in the model.
        hidden_error (`float`, *optional*): Root mean square of what its output lost, in this and all earlier layers,
            over that of the original output.
        shift_before (`float`, *optional*): Mean square of what the input of its MLP lost by the quantized attention;
            of what the final norm's output lost by the quantized MLP before it.
        shift_after (`float`, *optional*): The same with the mean shift corrected, measured.
        shift_expected (`float`, *optional*): The same as it has to be: less by exactly the square of the mean, where
            the correction is not clamped.
    """

    name: str
    hidden_error: float | None = None
    shift_before: float | None = None
    shift_after: float | None = None
    shift_expected: float | None = None


@dataclass
class LayerAllocation:
    """
    Setting of a decoder layer by the sensitivity of its weights, found by NSDS.

    Attributes:
        name (`str`): Module name in the model.
        numerical (`float`): How easily it loses by rounding, in (0, 1): kurtosis of its weights.
        structural (`float`): How much it expresses, in (0, 1): singular values of its weights.
        score (`float`): Both in one number.
        given (`int`): Its bits or planes.
    """

    name: str
    numerical: float
    structural: float
    score: float
    given: int


@dataclass
class Report:
    """
    Report of quantizing a model. `dataclasses.asdict` makes it JSON-able.

    Attributes:
        method (`str`): Name of the method.
        layers (`list[LayerReport]`): The quantized layers, in the order of the checkpoint.
        skipped (`list[str]`): Linear layers, and parameters of other shapes with a weight matrix for each expert, left
            as they were.
        readers (`dict[str, str]`): Of these the linear layers with a `weight` that other code reads, with the function
            that does.
        resolved (`int`): Layers that were solved a second time.
        blocks (`list[BlockReport]`): The decoder layers, if there was calibration text.
        final_norm (`BlockReport`, *optional*): The final norm, if its mean shift was corrected.
        allocation (`list[LayerAllocation]`): The decoder layers, if NSDS chose what they get.
        seconds (`float`): Time in the solver.
        weights_per_second (`float`): Weights quantized a second of that time.
        file_bytes (`int`, *optional*): Bytes of the weight files with everything in them, once saved.
        source_bytes (`int`, *optional*): Bytes of the weight files before.
        parameters (`int`, *optional*): Parameters of the whole model before quantization, tied ones counted once.
        bits_per_weight (`float`, *optional*): `8 * file_bytes / parameters`: scales, embeddings and headers included.
        quantized_bits_per_weight (`float`, *optional*): Bits of a weight in the quantized layers, scales included.
        baseline_file_bytes (`int`, *optional*): Bytes that the files would have if the same layers were rounded to 4
            bits.
        eval_data (`str`, *optional*): What the perplexities were measured on.
        perplexity_before (`float`, *optional*): Perplexity of the model that was quantized.
        perplexity_after (`float`, *optional*): Perplexity of the quantized model, as loaded from its folder.
        perplexity_rounded (`float`, *optional*): Perplexity of the model before with the same layers rounded to 4
            bits.
        rounding_seconds (`float`, *optional*): Time that it took to round them and to measure that.
        bits_before (`int`, *optional*): Bits of a weight of the model before.
        begins_with (`str`, *optional*): What every window of text begins with, in measurement and calibration, because
            the tokenizer puts it before a text.
    """

    method: str
    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    readers: dict[str, str] = field(default_factory=dict)
    resolved: int = 0
    blocks: list[BlockReport] = field(default_factory=list)
    final_norm: BlockReport | None = None
    allocation: list[LayerAllocation] = field(default_factory=list)
    seconds: float = 0.0
    weights_per_second: float = 0.0
    file_bytes: int | None = None
    source_bytes: int | None = None
    parameters: int | None = None
    bits_per_weight: float | None = None
    quantized_bits_per_weight: float | None = None
    baseline_file_bytes: int | None = None
    eval_data: str | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_rounded: float | None = None
    rounding_seconds: float | None = None
    bits_before: int | None = None
    begins_with: str | None = None

    def add(self, layer: LayerReport, seconds: float) -> None:
        """Counts one more matrix. Those of one name, as the experts of a layer have it, become one layer."""
        known = next((one for one in reversed(self.layers) if one.name == layer.name), None)
        if known is None:
            self.layers.append(layer)
        else:
            known.baseline_error = _mean([known, layer], "baseline_error")
            known.relative_error = _root_mean_square([(one.weights, one.relative_error) for one in (known, layer)])
            known.weights += layer.weights
            if known.baseline_bytes is not None and layer.baseline_bytes is not None:
                known.baseline_bytes += layer.baseline_bytes
            known.resolved |= layer.resolved
        self.resolved = sum(layer.resolved for layer in self.layers)
        self.seconds += seconds
        self.weights_per_second = sum(layer.weights for layer in self.layers) / self.seconds if self.seconds else 0.0

    def merge(self, other: "Report") -> None:
        """Counts the matrices of another report."""
        for layer in other.layers:
            self.add(layer, other.seconds / len(other.layers))

    def set_size(self, size: "Size", source_bytes: int) -> None:
        """Fills in what a [`~hf_rb.evaluation.Size`] of the written folder says."""
        self.file_bytes, self.parameters, self.bits_per_weight = size.file_bytes, size.weights, size.bits_per_weight
        self.source_bytes, self.quantized_bits_per_weight = source_bytes, size.quantized_bits_per_weight
        theirs = [layer.baseline_bytes for layer in self.layers if layer.baseline_bytes is not None]
        if len(theirs) == len(self.layers) and size.quantized_bits_per_weight is not None:
            ours = round(size.quantized_weights * size.quantized_bits_per_weight / 8)
            self.baseline_file_bytes = size.file_bytes - ours + sum(theirs)

    def error_by_kind(self, which: str = "relative_error") -> dict[str, float | None]:
        """Error by kind of layer: the root of the mean square over its weights. `which` may be `"baseline_error"`."""
        kinds: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer)
        return {kind: _mean(layers, which) for kind, layers in kinds.items()}

    def error(self, which: str = "relative_error") -> float | None:
        """Error over all quantized weights, like that of [`~Report.error_by_kind`]."""
        return _mean(self.layers, which)

    def markdown(self) -> str:
        """Returns the measurements as Markdown for a model card; an empty text if there are none."""
        sentences = []
        if self.eval_data:
            before, after = self.perplexity_before, self.perplexity_after
            windows = f" (each window begins with `{self.begins_with}`)" if self.begins_with else ""
            sentences.append(
                f"Perplexity on `{self.eval_data}`{windows}: **{after:.4g}**, before quantization {before:.4g}. "
                f"{self.quality()}"
            )
        if not self.verdict().startswith(NOT_COMPARED):
            sentences.append(self.verdict())
        return "\n\n".join(sentences)

    def quality(self) -> "Verdict | None":
        """Returns the verdict on the quantized model, where the perplexity was measured."""
        if self.perplexity_after is None or self.perplexity_before is None:
            return None
        from hf_rb.evaluation.verdict import judge

        original = f"{self.bits_before} bits" if self.bits_before else "the model before"
        return judge(self.perplexity_after, self.perplexity_before, original, self.perplexity_rounded)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report for JSON, with what follows from it."""
        quality = self.quality()
        return asdict(self) | {"verdict": self.verdict(), "quality": quality and quality.to_dict()}

    def verdict(self) -> str:
        """One sentence on how 4-bit round-to-nearest with groups of 128 would compare, in bytes and error."""
        if self.blocks:
            if self.perplexity_rounded is not None:
                return f"{NOT_COMPARED} by errors of weights, which say little about a method that makes up for them."
            advice = "" if self.eval_data else "; measure the perplexity (`--eval-data`)"
            return f"{NOT_COMPARED}: errors of weights say little about a method that makes up for them{advice}."
        ours, theirs = self.error(), self.error("baseline_error")
        if ours is None or theirs is None or self.baseline_file_bytes is None or self.file_bytes is None:
            return f"{NOT_COMPARED}."
        accuracy = "more accurate" if theirs < ours else "no more accurate"
        errors = f"relative error {theirs:.4f} against {ours:.4f}"
        more = self.baseline_file_bytes / self.file_bytes - 1
        if more > 0:
            return f"Plain 4-bit rounding (group 128) would be {accuracy}, {errors}, in a file {more:.1%} larger."
        advice = "Prefer another format for this model: p" if theirs < ours else "P"
        return f"{advice}lain 4-bit rounding (group 128) would be {accuracy}, {errors}, in a file {-more:.1%} smaller."


def _mean(layers: Iterable[LayerReport], which: str) -> float | None:
    pairs = [(layer.weights, getattr(layer, which)) for layer in layers]
    return None if not pairs or any(error is None for _, error in pairs) else _root_mean_square(pairs)


def _root_mean_square(pairs: list[tuple[int, float]]) -> float:
    """Returns the root mean square of errors over the weights that each is of."""
    return (sum(weights * error**2 for weights, error in pairs) / sum(weights for weights, _ in pairs)) ** 0.5
