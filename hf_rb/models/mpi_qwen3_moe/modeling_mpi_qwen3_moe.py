"""Qwen3-MoE with routers of manifold power iteration (https://huggingface.co/papers/2606.12397)."""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeModel,
    Qwen3MoeTopKRouter,
)

from hf_rb.models.mpi.modeling import MPIForCausalLM, MPIModel, MPIPreTrainedModel, MPIRouter, register
from hf_rb.models.mpi_qwen3_moe.configuration_mpi_qwen3_moe import MPIQwen3MoeConfig


__all__ = ["MPIQwen3MoeForCausalLM", "MPIQwen3MoeForSequenceClassification", "MPIQwen3MoeModel"]


class MPIQwen3MoeTopKRouter(MPIRouter, Qwen3MoeTopKRouter):
    native_class = Qwen3MoeTopKRouter


class MPIQwen3MoeModel(MPIModel, Qwen3MoeModel):
    """The backbone, without a head."""

    config_class = MPIQwen3MoeConfig
    native_class = Qwen3MoeModel
    router_class = MPIQwen3MoeTopKRouter


class MPIQwen3MoeForCausalLM(MPIForCausalLM, Qwen3MoeForCausalLM):
    """
    Qwen3-MoE whose routers route with one power step of themselves and the gate of their experts.

    It reads and writes checkpoints as the native class does. [`fold_mpi`] makes it the native class.
    """

    config_class = MPIQwen3MoeConfig
    native_class = Qwen3MoeForCausalLM
    model_class = MPIQwen3MoeModel


class MPIQwen3MoeForSequenceClassification(MPIPreTrainedModel, Qwen3MoeForSequenceClassification):
    """Qwen3-MoE with a head for classes or rewards."""

    config_class = MPIQwen3MoeConfig
    native_class = Qwen3MoeForSequenceClassification


register(
    "qwen3_moe",
    MPIQwen3MoeConfig,
    {
        AutoModel: MPIQwen3MoeModel,
        AutoModelForCausalLM: MPIQwen3MoeForCausalLM,
        AutoModelForSequenceClassification: MPIQwen3MoeForSequenceClassification,
    },
)
