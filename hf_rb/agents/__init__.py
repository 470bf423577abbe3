"""Environments of agents under the name that users import; [`hf_rb.rl.agents`] has them."""

from hf_rb.rl.agents import *  # noqa: F403
from hf_rb.rl.agents import __all__ as __all__
