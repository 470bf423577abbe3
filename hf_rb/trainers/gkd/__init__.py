"""Distillation on data and on completions of the student."""
