"""MPI routers, which compute with the experts' weights and so cannot do without them."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from hf_rb.io.safetensors import read_header


__all__ = ["refuse_mpi"]

LEARNED = (
    ".gate.parametrizations.weight.original",
    ".router.parametrizations.weight.original",
)  # what `apply_mpi` stores


def refuse_mpi(model: nn.Module, files: Sequence[str | Path] | None, method: str) -> None:
    """
    Refuses to pack the experts of a model with MPI routers, before anything is loaded.

    Args:
        model (`nn.Module`):
            Model on the meta device.
        files (`Sequence[str | Path]`, *optional*):
            Its files. A model after `apply_mpi` is told by what they hold.
        method (`str`):
            Name of the quantization method.

    Raises:
        ValueError: The model has MPI routers.
    """
    from hf_rb.models.mpi.conversion import routers

    name, remedy = type(model).__name__, "`fold_mpi(model)`, `save_pretrained`, and quantize what was saved."
    if any(layer.mpi is not None for layer in routers(model)):
        raise ValueError(
            f"The routers of {name} are computed from the experts' weights (MPI), which {method} would pack. Fold "
            f"them first: {remedy}"
        )
    for file in files or ():
        if Path(file).suffix == ".safetensors":
            if stored := next((key for key in read_header(Path(file))[0] if key.endswith(LEARNED)), None):
                raise ValueError(
                    f"{file} holds {stored}, a router of `apply_mpi`, which {name} does not read. Fold the routers "
                    f"before {method}: make the model, `apply_mpi`, load the file, {remedy}"
                )
