"""GRPO with shaped advantages."""
