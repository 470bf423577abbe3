"""Search environment under the name that users import; [`hf_rb.rl.agents.search`] has it."""

from hf_rb.rl.agents.search import *  # noqa: F403
from hf_rb.rl.agents.search import __all__ as __all__
