"""Judges under the name that users import; [`hf_rb.rl.judges`] has them."""

from hf_rb.rl.judges import *  # noqa: F403
from hf_rb.rl.judges import __all__ as __all__
