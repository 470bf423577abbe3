"""Bits for each layer."""
