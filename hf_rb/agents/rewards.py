"""Reward of a search under the name that users import; [`hf_rb.rl.agents.rewards`] has it."""

from hf_rb.rl.agents.rewards import *  # noqa: F403
from hf_rb.rl.agents.rewards import __all__ as __all__
