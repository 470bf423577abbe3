"""Findings of `hf-rb check` in one recipe."""

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_rb.cli.check.plan import Plan


__all__ = ["Findings"]


@dataclass
class Findings:
    """Errors and warnings about a recipe.

    Attributes:
        recipe (`str`): The recipe's path.
        verb (`str`): The verb it was checked for.
        errors (`list[str]`): Messages about what would stop the run.
        warnings (`list[str]`): Messages about what could not be decided, or may not be what one thinks.
        notes (`list[str]`): What the recipe does.
        plan ([`~hf_rb.cli.check.plan.Plan`], *optional*): Device, steps, tokens and memory of a good recipe for
            training.
    """

    recipe: str
    verb: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: Plan | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"plan": self.plan and self.plan.as_dict()}

    def show(self) -> None:
        """Prints the findings to stderr, or one line to stdout when there are none."""
        for kind, messages in (("error", self.errors), ("warning", self.warnings)):
            for message in messages:
                print(f"{self.recipe}: {kind}: {message}", file=sys.stderr)
        if not self.errors:
            print(f"{self.recipe}: a good recipe for `hf-rb {self.verb}`.")
            for note in [*self.notes, *(self.plan.lines() if self.plan else ())]:
                print(f"{self.recipe}: {note}")
