"""Qwen3-MoE with routers of manifold power iteration."""
