"""Reward functions under the name that recipes and users import; [`hf_rb.rl.rewards`] has them."""

from hf_rb.rl.rewards import *  # noqa: F403
from hf_rb.rl.rewards import __all__ as __all__
