"""OLMoE with routers of manifold power iteration."""
