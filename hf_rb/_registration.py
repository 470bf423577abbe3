"""Registers our classes with the Hugging Face libraries at the moment each of those is imported."""


def register() -> None:
    pass
