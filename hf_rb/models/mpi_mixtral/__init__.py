"""Mixtral with routers of manifold power iteration."""
