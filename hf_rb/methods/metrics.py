"""Metrics that trainers log beside those of a method. Standard library only."""

from hf_rb.methods.record import Metric


__all__ = ["ROUTER_METRICS", "SHAPING_METRICS", "TOKEN_METRICS", "TRAINER_METRICS"]

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
    Metric(
        "shaping/answered", "share of completions with an answer, where a shaper reads answers", "[0, 1]", "higher"
    ),
    Metric("outside_vocabulary_fraction", "share of labels that teacher and student do not share", "[0, 1]", "lower"),
    Metric("search/f1", "mean F1 of the answers of a search agent, by the reward `search_f1`", "[0, 1]", "higher"),
    Metric("search/well_formed", "share of its completions that are of the agreed form", "[0, 1]", "higher"),
)
"""Numbers that trainers log with every method."""

SHAPING_METRICS = (
    Metric("mean", "mean advantage after the shaper, over scored rollouts or over tokens in the loss"),
    Metric("std", "standard deviation of the advantages after it", "[0, inf)"),
    Metric("changed", "share of advantages that it changed", "[0, 1]"),
    Metric("flipped", "share of advantages whose sign it changed", "[0, 1]"),
    Metric("delta_abs", "mean absolute change of an advantage", "[0, inf)"),
)
"""Numbers that GRPO logs of every shaper, as `shaping/<key>/<name>`."""

ROUTER_METRICS = (
    Metric("max_vio", "most loaded expert over the mean load, less 1, in an optimizer step", "[0, inf)", "lower"),
    Metric("global_max_vio", "the same over everything since the last log", "[0, inf)", "lower"),
    Metric("dead", "number of experts that no token has chosen since the last log", "[0, inf)", "lower"),
    Metric("load_entropy", "entropy of the load over that of an even one", "[0, 1]", "higher"),
    Metric("entropy", "mean entropy of a token's routing over the largest there is", "[0, 1]"),
    Metric("lambda_learned", "alignment of the learned rows with their experts, see `alignment`", "[0, 1]"),
    Metric("lambda_effective", "that of the rows that route", "[0, 1]"),
    Metric("lambda_random", "that of random rows after a power step", "[0, 1]"),
)
"""Means over layers that the router doctor logs, as `router/<name>`; with `layers` also `router/<layer>/<name>`."""
