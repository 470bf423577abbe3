"""MPI, routers with manifold power iteration: the maths, on any mixture of experts, and what the model classes
share.
"""

from hf_rb.methods import ModelMethod, Paper
from hf_rb.models.mpi.conversion import apply_mpi, fold_mpi
from hf_rb.models.mpi.functional import alignment, effective_router


__all__ = ["alignment", "apply_mpi", "effective_router", "fold_mpi"]

METHOD = ModelMethod(
    key="mpi",
    name="MPI",
    paper=Paper(
        "2606.12397",
        "Redesign Mixture-of-Experts Routers with Manifold Power Iteration",
        "Songhao Wu, Ang Lv, Ruobing Xie, Yankai Lin",
    ),
    summary="Routers of a mixture of experts whose rows take one step of power iteration with the gate matrix"
    " of their expert, and a fixed length, in every forward pass.",
)
