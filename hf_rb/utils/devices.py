"""Facts about the machine that a run needs before torch is imported."""

__all__ = ["cpu_arguments"]


def cpu_arguments(use_cpu: bool | None, fp16: bool | None, bf16: bool | None) -> list[str]:
    """Returns what the values of a recipe lack to run where there is no GPU: bfloat16 is possible, float16 is not."""
    if use_cpu:
        return []
    plain = ["--fp16", "false"] * bool(fp16) + ["--bf16", "false"] if fp16 or bf16 is None else []
    return ["--use_cpu", "true", *plain]
