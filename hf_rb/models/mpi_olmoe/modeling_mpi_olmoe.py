"""OLMoE with routers of manifold power iteration (https://huggingface.co/papers/2606.12397)."""

from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeForCausalLM,
    OlmoeModel,
    OlmoeTopKRouter,
)

from hf_rb.models.mpi.modeling import MPIForCausalLM, MPIModel, MPIRouter, register
from hf_rb.models.mpi_olmoe.configuration_mpi_olmoe import MPIOlmoeConfig


__all__ = ["MPIOlmoeForCausalLM", "MPIOlmoeModel"]


class MPIOlmoeTopKRouter(MPIRouter, OlmoeTopKRouter):
    native_class = OlmoeTopKRouter


class MPIOlmoeModel(MPIModel, OlmoeModel):
    """The backbone, without a head."""

    config_class = MPIOlmoeConfig
    native_class = OlmoeModel
    router_class = MPIOlmoeTopKRouter


class MPIOlmoeForCausalLM(MPIForCausalLM, OlmoeForCausalLM):
    """
    OLMoE whose routers route with one power step of themselves and the gate of their experts.

    It reads and writes checkpoints as the native class does. [`fold_mpi`] makes it the native class.
    """

    config_class = MPIOlmoeConfig
    native_class = OlmoeForCausalLM
    model_class = MPIOlmoeModel


register(
    "olmoe",
    MPIOlmoeConfig,
    {
        AutoModel: MPIOlmoeModel,
        AutoModelForCausalLM: MPIOlmoeForCausalLM,
    },
)
