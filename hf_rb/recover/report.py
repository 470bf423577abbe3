"""The table of a recovery: full precision, quantized, recovered, by method and budget."""

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_rb.evaluation import Verdict, judge
from hf_rb.utils.output import format_table


__all__ = ["RecoverReport", "Row"]


@dataclass
class Row:
    """
    A model of the table.

    Attributes:
        model (`str`): What its weights are.
        bytes (`int`): Of all weight files that inference needs, the adapter's too.
        exact_match (`float`, *optional*): Share of the held-out problems that it solves.
        perplexity (`float`): On the held-out text, or else on the worked solutions of the held-out problems.
        tokens_per_second (`float`): Greedy decoding of one sequence on the machine that measured.
        objective (`str`, *optional*): What its adapter was trained with.
        examples (`int`, *optional*): How many examples it was trained on.
        failing (`int`, *optional*): How many of them are about problems that quantization had broken.
        seconds (`float`, *optional*): Time of the training.
        regained (`float`, *optional*): Part of the lost exact match that came back; 1 is all of it.
    """

    model: str
    bytes: int
    exact_match: float | None
    perplexity: float
    tokens_per_second: float
    objective: str | None = None
    examples: int | None = None
    failing: int | None = None
    seconds: float | None = None
    regained: float | None = None


@dataclass
class RecoverReport:
    """
    Report of a recovery. `dataclasses.asdict` makes it JSON-able.

    Attributes:
        task, text (`str`, *optional*): What exact match and perplexity were measured on.
        problems (`int`): Held-out problems.
        failures (`dict[str, dict]`): Of each quantized model, how many problems of the pool it has broken (see
            [`Comparison`]).
        rows (`list[Row]`): The table.
        base_sha256 (`str`, *optional*): Fingerprint of the packed weights, which training leaves as they are.
        notes (`list[str]`): What a reader should know.
        begins_with (`str`, *optional*): What every window of the text begins with, as the tokenizer has it.
        rounded_perplexity (`float`, *optional*): Perplexity with the packed layers rounded to 4 bits instead.
        rounding_seconds (`float`, *optional*): Time that it took to load, round and measure that.
    """

    task: str | None
    text: str | None
    problems: int
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    base_sha256: str | None = None
    notes: list[str] = field(default_factory=list)
    begins_with: str | None = None
    rounded_perplexity: float | None = None
    rounding_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        quality = self.quality()
        return {"format_version": 1} | asdict(self) | {"quality": quality and quality.to_dict()}

    def quality(self) -> Verdict | None:
        """Returns the verdict on the package's model against full precision: on the first recovered one, or else on
        the quantized one.
        """
        if len(self.rows) < 2:
            return None
        return judge(self._result.perplexity, self.rows[0].perplexity, "full precision", self.rounded_perplexity)

    @property
    def _result(self) -> Row:
        return next((row for row in self.rows if row.objective), self.rows[1])

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        columns = ["model", "trained with", "examples", "bytes", "exact match", "regained", "perplexity", "tokens/s"]
        rows = [
            [
                row.model,
                row.objective or "-",
                "-" if row.examples is None else f"{row.examples}" + f" ({row.failing} broken)" * bool(row.failing),
                f"{row.bytes:,}",
                _percent(row.exact_match),
                _percent(row.regained),
                f"{row.perplexity:.4g}",
                f"{row.tokens_per_second:.0f}",
            ]
            for row in self.rows
        ]
        empty = {index for index in range(len(columns)) if all(row[index] == "-" for row in rows)}
        return (
            [name for index, name in enumerate(columns) if index not in empty],
            [[cell for index, cell in enumerate(row) if index not in empty] for row in rows],
        )

    def table(self) -> str:
        """The table for a terminal."""
        return format_table(*self._cells())

    def markdown(self) -> str:
        """The table for a model card, with what it was measured on."""
        columns, rows = self._cells()
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        measured = [f"exact match on {self.problems} problems of {self.task}"] if self.task else []
        begins = f" (each window begins with `{self.begins_with}`)" if self.begins_with else ""
        measured += [f"perplexity on {self.text}{begins}" if self.text else "perplexity on their worked solutions"]
        what = f"Measured: {', '.join(measured)}. Bytes are those of all weight files."
        return "\n".join([*lines, "", what, *self.sentences()])

    def sentences(self) -> list[str]:
        """Returns the sentences below the table: how good the result is, and what a reader should know."""
        if (quality := self.quality()) is None:
            return list(self.notes)
        before, after = self.rows[0].exact_match, self._result.exact_match
        fell = (
            []
            if before is None or after is None or after >= before
            else [
                f"Exact match fell from {_percent(before)} to {_percent(after)}, which perplexity need not show: "
                "judge by both."
            ]
        )
        return [str(quality), *fell, *self.notes]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
