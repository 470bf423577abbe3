"""The maths of D²Quant, on tensors."""
