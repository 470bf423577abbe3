"""One script a trainer or tool: `accelerate launch -m hf_rb.scripts.sft --config recipe.yaml`."""
