"""Quantization backends for `from_pretrained(..., quantization_config=...)`, and the function behind `hf-rb quantize`."""
