"""MPI, routers with manifold power iteration: the maths, on any mixture of experts, and what the model classes
share.
"""

from hf_rb.models.mpi.conversion import apply_mpi, fold_mpi
from hf_rb.models.mpi.functional import alignment, effective_router


__all__ = ["alignment", "apply_mpi", "effective_router", "fold_mpi"]
