"""Model cards and uploads: what a model is, how it was made, what was measured, how to load it, and its way to the
Hub.
"""

from hf_rb.hub.card import (
    ModelCardData,
    Result,
    changed_hyperparameters,
    read_origin,
    render_card,
    render_results,
    write_model_card,
)
from hf_rb.hub.loading import Loading, adapter_settings, model_loading, read_loading
from hf_rb.hub.push import Upload, check_repo_id, plan_upload, push_folder
from hf_rb.hub.results import add_results, add_section, card_with_results, read_results
from hf_rb.methods import Method
from hf_rb.methods.registry import catalog


__all__ = [
    "METHODS",
    "Loading",
    "Method",
    "ModelCardData",
    "Result",
    "Upload",
    "adapter_settings",
    "add_results",
    "add_section",
    "card_with_results",
    "changed_hyperparameters",
    "check_repo_id",
    "model_loading",
    "plan_upload",
    "push_folder",
    "read_loading",
    "read_origin",
    "read_results",
    "render_card",
    "render_results",
    "write_model_card",
]

METHODS = catalog()
"""The methods of this package and of installed ones, by key."""
