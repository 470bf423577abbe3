"""PTQTP: post-training quantization to trit-planes (https://huggingface.co/papers/2509.16989)."""

from typing import TYPE_CHECKING

from hf_rb.utils.lazy import lazy_names


if TYPE_CHECKING:
    from hf_rb.quantizers.ptqtp.config import PTQTPConfig
    from hf_rb.quantizers.ptqtp.format import TritPlanes
    from hf_rb.quantizers.ptqtp.layers import PTQTPExperts, PTQTPLinear
    from hf_rb.quantizers.ptqtp.quantizer import PTQTPQuantizer
    from hf_rb.quantizers.ptqtp.solver import solve

__all__ = ["PTQTPConfig", "PTQTPExperts", "PTQTPLinear", "PTQTPQuantizer", "TritPlanes", "solve"]

__getattr__, __dir__ = lazy_names(__name__)
