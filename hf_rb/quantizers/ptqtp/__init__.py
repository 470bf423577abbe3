"""PTQTP: post-training quantization to trit-planes (https://huggingface.co/papers/2509.16989)."""

from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.linear import PTQTPLinear
from hf_rb.quantizers.ptqtp.packing import TritPlanes
from hf_rb.quantizers.ptqtp.quantizer import PTQTPQuantizer
from hf_rb.quantizers.ptqtp.solver import solve


__all__ = ["PTQTPConfig", "PTQTPLinear", "PTQTPQuantizer", "TritPlanes", "solve"]
