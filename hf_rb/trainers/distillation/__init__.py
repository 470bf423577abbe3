"""On-policy distillation on TRL's `DistillationTrainer`."""
