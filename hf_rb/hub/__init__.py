"""Model cards: what a model is, how it was made, what was measured, and how to load it."""

from hf_rb.hub.card import ModelCardData, Result, changed_hyperparameters, render_card, write_model_card
from hf_rb.hub.methods import METHODS, Method


__all__ = [
    "METHODS",
    "Method",
    "ModelCardData",
    "Result",
    "changed_hyperparameters",
    "render_card",
    "write_model_card",
]
