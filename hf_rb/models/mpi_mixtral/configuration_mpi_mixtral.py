"""Configuration of Mixtral with routers of manifold power iteration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import MixtralConfig

from hf_rb.models.mpi.configuration import MPIConfig


__all__ = ["MPIMixtralConfig"]


@strict
class MPIMixtralConfig(MPIConfig, MixtralConfig):
    """
    Configuration of [`MPIMixtralForCausalLM`]: that of Mixtral and the fields of MPI
    (https://huggingface.co/papers/2606.12397), `mpi_matrix`, `mpi_iters`, `mpi_scale`, `mpi_norm`, `mpi_mode`,
    `mpi_grad`, `mpi_eps`, `lb_type` and `z_loss_coef`, which are those of
    [`~hf_rb.models.mpi.configuration.MPIConfig`].

    Example:

    ```python
    from transformers import AutoModelForCausalLM

    from hf_rb import MPIMixtralConfig

    model = AutoModelForCausalLM.from_config(MPIMixtralConfig(num_hidden_layers=2, mpi_scale=4.0))
    ```
    """

    model_type = "mpi_mixtral"
    native_class: ClassVar[type] = MixtralConfig
    auto_map: ClassVar[dict] = {}  # TRL reads it
