"""The methods' mathematics as pure functions of tensors. Nothing here knows a trainer, a model or a file."""

from hf_rb.objectives.akl import adaptive_kl, adaptive_kl_weight
from hf_rb.objectives.divergences import forward_kl, jsd, reverse_kl
from hf_rb.objectives.gopd import gopd_advantage
from hf_rb.objectives.hpd import hpd_loss, hpd_weights
from hf_rb.objectives.loca import loca_calibrate
from hf_rb.objectives.profit import profit_mask


__all__ = [
    "adaptive_kl",
    "adaptive_kl_weight",
    "forward_kl",
    "gopd_advantage",
    "hpd_loss",
    "hpd_weights",
    "jsd",
    "loca_calibrate",
    "profit_mask",
    "reverse_kl",
]
