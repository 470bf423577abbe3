"""Configuration of OLMoE with routers of manifold power iteration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import OlmoeConfig

from hf_rb.models.mpi.configuration import MPIConfig


__all__ = ["MPIOlmoeConfig"]


@strict
class MPIOlmoeConfig(MPIConfig, OlmoeConfig):
    """
    Configuration of [`MPIOlmoeForCausalLM`]: that of OLMoE and the fields of MPI
    (https://huggingface.co/papers/2606.12397), `mpi_matrix`, `mpi_iters`, `mpi_scale`, `mpi_norm`, `mpi_mode`,
    `mpi_grad`, `mpi_eps`, `lb_type` and `z_loss_coef`, which are those of
    [`~hf_rb.models.mpi.configuration.MPIConfig`].

    Example:

    ```python
    from transformers import AutoModelForCausalLM

    from hf_rb import MPIOlmoeConfig

    model = AutoModelForCausalLM.from_config(MPIOlmoeConfig(num_hidden_layers=2, mpi_scale=4.0))
    ```
    """

    model_type = "mpi_olmoe"
    native_class: ClassVar[type] = OlmoeConfig
    auto_map: ClassVar[dict] = {}  # TRL reads it

    norm_topk_prob: bool = True
