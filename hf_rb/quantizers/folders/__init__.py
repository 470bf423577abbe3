"""Whole checkpoints: quantize, stream, dequantize, export."""
