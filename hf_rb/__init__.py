"""Recent papers on distillation, RL, quantization and MoE routers as drop-in parts of the Hugging Face stack.

Importing this package registers it with transformers and PEFT, and imports neither of them, nor torch: the public names
below load on first use.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_rb import _registration


if TYPE_CHECKING:
    from hf_rb.models.mpi.conversion import apply_mpi, fold_mpi
    from hf_rb.models.mpi_mixtral.configuration_mpi_mixtral import MPIMixtralConfig
    from hf_rb.models.mpi_mixtral.modeling_mpi_mixtral import MPIMixtralForCausalLM
    from hf_rb.models.mpi_olmoe.configuration_mpi_olmoe import MPIOlmoeConfig
    from hf_rb.models.mpi_olmoe.modeling_mpi_olmoe import MPIOlmoeForCausalLM
    from hf_rb.models.mpi_qwen3_moe.configuration_mpi_qwen3_moe import MPIQwen3MoeConfig
    from hf_rb.models.mpi_qwen3_moe.modeling_mpi_qwen3_moe import MPIQwen3MoeForCausalLM
    from hf_rb.quantizers.d2quant.config import D2QuantConfig
    from hf_rb.quantizers.ptqtp.config import PTQTPConfig
    from hf_rb.trainers.distillation_config import DistillationConfig
    from hf_rb.trainers.distillation_trainer import DistillationTrainer
    from hf_rb.trainers.gkd_config import GKDConfig
    from hf_rb.trainers.gkd_trainer import GKDTrainer
    from hf_rb.trainers.grpo_config import GRPOConfig
    from hf_rb.trainers.grpo_trainer import GRPOTrainer
    from hf_rb.trainers.sft_config import SFTConfig
    from hf_rb.trainers.sft_trainer import SFTTrainer

__version__ = "0.1.0.dev0"

_MODULES = {
    "D2QuantConfig": "hf_rb.quantizers.d2quant.config",
    "DistillationConfig": "hf_rb.trainers.distillation_config",
    "DistillationTrainer": "hf_rb.trainers.distillation_trainer",
    "GKDConfig": "hf_rb.trainers.gkd_config",
    "GKDTrainer": "hf_rb.trainers.gkd_trainer",
    "GRPOConfig": "hf_rb.trainers.grpo_config",
    "GRPOTrainer": "hf_rb.trainers.grpo_trainer",
    "MPIMixtralConfig": "hf_rb.models.mpi_mixtral.configuration_mpi_mixtral",
    "MPIMixtralForCausalLM": "hf_rb.models.mpi_mixtral.modeling_mpi_mixtral",
    "MPIOlmoeConfig": "hf_rb.models.mpi_olmoe.configuration_mpi_olmoe",
    "MPIOlmoeForCausalLM": "hf_rb.models.mpi_olmoe.modeling_mpi_olmoe",
    "MPIQwen3MoeConfig": "hf_rb.models.mpi_qwen3_moe.configuration_mpi_qwen3_moe",
    "MPIQwen3MoeForCausalLM": "hf_rb.models.mpi_qwen3_moe.modeling_mpi_qwen3_moe",
    "PTQTPConfig": "hf_rb.quantizers.ptqtp.config",
    "SFTConfig": "hf_rb.trainers.sft_config",
    "SFTTrainer": "hf_rb.trainers.sft_trainer",
    "apply_mpi": "hf_rb.models.mpi.conversion",
    "fold_mpi": "hf_rb.models.mpi.conversion",
}

__all__ = [
    "D2QuantConfig",
    "DistillationConfig",
    "DistillationTrainer",
    "GKDConfig",
    "GKDTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "MPIMixtralConfig",
    "MPIMixtralForCausalLM",
    "MPIOlmoeConfig",
    "MPIOlmoeForCausalLM",
    "MPIQwen3MoeConfig",
    "MPIQwen3MoeForCausalLM",
    "PTQTPConfig",
    "SFTConfig",
    "SFTTrainer",
    "apply_mpi",
    "fold_mpi",
]


# `hf_rb.tiny` and the like, without an import of their own.
_PACKAGES = (
    "advantages",
    "evaluation",
    "models",
    "objectives",
    "quantizers",
    "recover",
    "teachers",
    "tiny",
    "weights",
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        # With the name and the module, Python's traceback adds "Did you mean".
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


_registration.register()
