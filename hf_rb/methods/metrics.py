"""What trainers log beside the numbers of a method: name, meaning, range and direction. Standard library only."""

from hf_rb.methods.record import Metric


__all__ = ["TOKEN_METRICS", "TRAINER_METRICS"]

TOKEN_METRICS = (
    Metric("forward_kl", "KL(teacher ‖ student)", "[0, inf)", "lower"),
    Metric("reverse_kl", "KL(student ‖ teacher)", "[0, inf)", "lower"),
    Metric("entropy", "entropy of the student, in nats", "[0, inf)"),
    Metric("ce", "cross-entropy of the student on the labels, in nats", "[0, inf)", "lower", stat="nll"),
    Metric("kd", "divergence before `kd_alpha` mixes it with the cross-entropy", "[0, inf)", "lower"),
)
"""Means over tokens that the distillation trainers log with every objective that reports them."""

TRAINER_METRICS = (
    Metric("kept_fraction", "share of all tokens that are trained on", "[0, 1]"),
    Metric("aux_loss", "balance loss of a mixture of experts", "[0, inf)", "lower"),
    Metric("outside_vocabulary_fraction", "share of labels that teacher and student do not share", "[0, 1]", "lower"),
)
"""Numbers that trainers log with every method."""
