"""Mixtral with routers of manifold power iteration (https://huggingface.co/papers/2606.12397)."""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.mixtral.modeling_mixtral import (
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    MixtralModel,
    MixtralTopKRouter,
)

from hf_rb.models.mpi.modeling import MPIForCausalLM, MPIModel, MPIPreTrainedModel, MPIRouter, register
from hf_rb.models.mpi_mixtral.configuration_mpi_mixtral import MPIMixtralConfig


__all__ = ["MPIMixtralForCausalLM", "MPIMixtralForSequenceClassification", "MPIMixtralModel"]


class MPIMixtralTopKRouter(MPIRouter, MixtralTopKRouter):
    native_class = MixtralTopKRouter


class MPIMixtralModel(MPIModel, MixtralModel):
    """The backbone, without a head."""

    config_class = MPIMixtralConfig
    native_class = MixtralModel
    router_class = MPIMixtralTopKRouter


class MPIMixtralForCausalLM(MPIForCausalLM, MixtralForCausalLM):
    """
    Mixtral whose routers route with one power step of themselves and the gate of their experts.

    It reads and writes checkpoints as the native class does. [`fold_mpi`] makes it the native class.
    """

    config_class = MPIMixtralConfig
    native_class = MixtralForCausalLM
    model_class = MPIMixtralModel


class MPIMixtralForSequenceClassification(MPIPreTrainedModel, MixtralForSequenceClassification):
    """Mixtral with a head for classes or rewards."""

    config_class = MPIMixtralConfig
    native_class = MixtralForSequenceClassification


register(
    "mixtral",
    MPIMixtralConfig,
    {
        AutoModel: MPIMixtralModel,
        AutoModelForCausalLM: MPIMixtralForCausalLM,
        AutoModelForSequenceClassification: MPIMixtralForSequenceClassification,
    },
)
