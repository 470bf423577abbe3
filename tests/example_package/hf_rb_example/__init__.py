"""Methods for hf_rb from another package."""
