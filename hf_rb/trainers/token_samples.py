"""Token samples under the name that users import; [`hf_rb.trainers.common.token_samples`] makes them."""

from hf_rb.trainers.common.token_samples import *  # noqa: F403
from hf_rb.trainers.common.token_samples import __all__ as __all__
