"""Recent papers on distillation, RL, quantization and MoE routers as drop-in parts of the Hugging Face stack.

Importing this package registers it with transformers and PEFT, and imports neither of them, nor torch: the public
names below load on first use.
"""

from typing import TYPE_CHECKING

from hf_rb.integrations import registration
from hf_rb.utils.lazy import lazy_names


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
    from hf_rb.trainers.distillation.config import DistillationConfig
    from hf_rb.trainers.distillation.trainer import DistillationTrainer
    from hf_rb.trainers.gkd.config import GKDConfig
    from hf_rb.trainers.gkd.trainer import GKDTrainer
    from hf_rb.trainers.grpo.config import GRPOConfig
    from hf_rb.trainers.grpo.trainer import GRPOTrainer
    from hf_rb.trainers.sft.config import SFTConfig
    from hf_rb.trainers.sft.trainer import SFTTrainer

__version__ = "0.1.0.dev0"

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

__getattr__, __dir__ = lazy_names(__name__, _PACKAGES)

registration.register()
