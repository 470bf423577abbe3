"""What quantizing a model did, layer by layer."""

from dataclasses import dataclass, field


__all__ = ["LayerReport", "Report"]


@dataclass
class LayerReport:
    """
    One quantized layer.

    Attributes:
        name (`str`): Module name in the model.
        weights (`int`): Weights in the layer.
        relative_error (`float`): Frobenius norm of the change over that of the weight, scales rounded as stored.
        resolved (`bool`): Whether the layer was solved a second time because the first stopping rule was too coarse.
    """

    name: str
    weights: int
    relative_error: float
    resolved: bool = False

    @property
    def kind(self) -> str:
        """The last part of the name: `q_proj`, `down_proj`, …"""
        return self.name.rpartition(".")[2]


@dataclass
class Report:
    """
    What quantizing a model did. `dataclasses.asdict` makes it JSON-able.

    Attributes:
        method (`str`): Name of the method.
        layers (`list[LayerReport]`): The quantized layers, in the order of the checkpoint.
        skipped (`list[str]`): Linear layers, and parameters of other shapes with a weight matrix for each expert, left as
            they were.
        resolved (`int`): Layers that were solved a second time.
        seconds (`float`): Time in the solver.
        weights_per_second (`float`): Weights quantized a second of that time.
        file_bytes (`int`, *optional*): Bytes of the weight files with everything in them, once saved.
        parameters (`int`, *optional*): Parameters of the whole model before quantization, tied ones counted once.
        bits_per_weight (`float`, *optional*): `8 * file_bytes / parameters`: scales, embeddings and headers included.
    """

    method: str
    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    resolved: int = 0
    seconds: float = 0.0
    weights_per_second: float = 0.0
    file_bytes: int | None = None
    parameters: int | None = None
    bits_per_weight: float | None = None

    def add(self, layer: LayerReport, seconds: float) -> None:
        """Counts one more layer."""
        self.layers.append(layer)
        self.resolved += layer.resolved
        self.seconds += seconds
        self.weights_per_second = sum(layer.weights for layer in self.layers) / self.seconds

    def error_by_kind(self) -> dict[str, float]:
        """Relative error by kind of layer: the root of the mean square over its layers."""
        kinds: dict[str, list[float]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer.relative_error**2)
        return {kind: (sum(squares) / len(squares)) ** 0.5 for kind, squares in kinds.items()}
