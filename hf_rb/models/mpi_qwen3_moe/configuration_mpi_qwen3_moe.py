"""Configuration of Qwen3-MoE with routers of manifold power iteration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig

from hf_rb.models.mpi.configuration import MPIConfig


__all__ = ["MPIQwen3MoeConfig"]


@strict
class MPIQwen3MoeConfig(MPIConfig, Qwen3MoeConfig):
    """
    Configuration of [`MPIQwen3MoeForCausalLM`]: that of Qwen3-MoE and the fields of MPI
    (https://huggingface.co/papers/2606.12397), `mpi_matrix`, `mpi_iters`, `mpi_scale`, `mpi_norm`, `mpi_mode`,
    `mpi_grad`, `mpi_eps`, `lb_type` and `z_loss_coef`, which are those of
    [`~hf_rb.models.mpi.configuration.MPIConfig`].

    Example:

    ```python
    from transformers import AutoModelForCausalLM

    from hf_rb import MPIQwen3MoeConfig

    model = AutoModelForCausalLM.from_config(MPIQwen3MoeConfig(num_hidden_layers=2, mpi_scale=4.0))
    ```
    """

    model_type = "mpi_qwen3_moe"
    native_class: ClassVar[type] = Qwen3MoeConfig
    auto_map: ClassVar[dict] = {}  # TRL reads it

    norm_topk_prob: bool = True
