"""Record of the packed parameters that have come while a model loads."""

from collections.abc import Collection

from torch import nn


__all__ = ["Arrivals"]


class Arrivals:
    """
    Packed parameters that are still to come while a model loads, and reasons for those that could not be made.

    Attributes:
        missing (`set[str]`): Full names of parameters.
    """

    def __init__(self):
        self.missing: set[str] = set()
        self._failures: list[str] = []

    def arrived(self, parameter: str) -> None:
        """Notes that a parameter is not missing, nor is what stands beside it."""
        self.missing = {one for one in self.missing if one != parameter and not one.startswith(f"{parameter}_")}

    def failed(self, parameter: str, error: Exception) -> None:
        """
        Notes why a parameter could not be made.

        Raised in a conversion, the error would end up in a table of the log. [`~Arrivals.check`] raises it when the
        last tensor has been seen.
        """
        self._failures.append(f"{parameter}{getattr(error, 'suffix', '')}: {error}")
        self.arrived(parameter)

    def check(self, model: nn.Module, expected: Collection[str]) -> None:
        """
        Raises a `ValueError` if a parameter is missing or could not be made.

        Args:
            model (`nn.Module`):
                The model.
            expected (`Collection[str]`):
                Full names of all packed parameters.
        """
        missing = sorted(self.missing)
        if len(missing) > 1 and self.missing.issuperset(expected):
            raise ValueError(
                f"{missing[0]}: not in the checkpoint, nor are {len(missing) - 1} more of {type(model).__name__}; is "
                "it the checkpoint of another class?"
            )
        if problems := [*self._failures, *(f"{name}: not in the checkpoint." for name in missing)]:
            raise ValueError("\n".join(problems))
