"""Results of quantizing a decoder layer, in memory and as the file from which an interrupted run goes on."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rb.io.safetensors import Output, read_header, write_tensors
from hf_rb.quantizers.d2quant.maths.dsq import DualCodes
from hf_rb.quantizers.d2quant.maths.grids import AffineCodes
from hf_rb.quantizers.packed.report import BlockReport, LayerReport


__all__ = ["LayerResult", "load_result", "save_result"]


@dataclass
class LayerResult:
    """
    Results of quantizing a decoder layer.

    Attributes:
        block (`BlockReport`): The decoder layer's part of the report.
        codes (`dict[str, AffineCodes | DualCodes]`): Codes and scales of the linear layers by their full names.
        shift (`torch.Tensor`, *optional*): Correction of what the MLP reads, `(hidden,)`.
        final_shift (`torch.Tensor`, *optional*): That of the final norm, with the last layer.
        layers (`list[LayerReport]`): The linear layers'.
        final (`BlockReport`, *optional*): The final norm's, with the last layer.
        seconds (`float`): Time in the solver.
    """

    block: BlockReport
    codes: dict[str, AffineCodes | DualCodes] = field(default_factory=dict)
    shift: Tensor | None = None
    final_shift: Tensor | None = None
    layers: list[LayerReport] = field(default_factory=list)
    final: BlockReport | None = None
    seconds: float = 0.0


def save_result(result: LayerResult, file: Path) -> None:
    """Writes a file that is there only when it is complete."""
    tensors = {name: getattr(result, name) for name in ("shift", "final_shift")}
    numbers = {}
    for name, codes in result.codes.items():
        parts = {part.name: getattr(codes, part.name) for part in fields(codes)}
        tensors |= {f"{name}/{part}": value for part, value in parts.items() if isinstance(value, Tensor)}
        numbers[name] = {part: value for part, value in parts.items() if not isinstance(value, Tensor)}
    said = {
        "codes": numbers,
        "layers": [asdict(layer) for layer in result.layers],
        "block": asdict(result.block),
        "final": result.final and asdict(result.final),
        "seconds": result.seconds,
    }
    outputs = {name: Output.of(tensor.cpu().contiguous()) for name, tensor in tensors.items() if tensor is not None}
    write_tensors(file, outputs, {"result": json.dumps(said)})


def load_result(file: Path, device: torch.device) -> LayerResult:
    """Reads what [`save_result`] has written."""
    entries, metadata = read_header(file)
    said = json.loads(metadata["result"])
    tensors = {name: entry.read().to(device) for name, entry in entries.items()}
    codes: dict[str, AffineCodes | DualCodes] = {}
    for name, numbers in said["codes"].items():
        kind = DualCodes if f"{name}/signs" in tensors else AffineCodes
        tensor_fields = (part.name for part in fields(kind) if part.name not in numbers)
        parts: dict[str, Any] = {part: tensors[f"{name}/{part}"] for part in tensor_fields}
        codes[name] = kind(**numbers, **parts)
    layers = [LayerReport(**layer) for layer in said["layers"]]
    return LayerResult(
        block=BlockReport(**said["block"]),
        codes=codes,
        shift=tensors.get("shift"),
        final_shift=tensors.get("final_shift"),
        layers=layers,
        final=said["final"] and BlockReport(**said["final"]),
        seconds=said["seconds"],
    )
