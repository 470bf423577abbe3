"""The types of weights that a user may name. Standard library only."""

__all__ = ["WEIGHT_TYPES", "WEIGHT_TYPES_OR_AUTO"]

WEIGHT_TYPES = ("float32", "bfloat16", "float16")
# `auto` is the type that a checkpoint was saved in.
WEIGHT_TYPES_OR_AUTO = ("auto", *WEIGHT_TYPES)
