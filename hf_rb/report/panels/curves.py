"""Logs of all runs in one drawing. Numbers of a method are in the panel of that method."""

from collections.abc import Sequence

from hf_rb.report.blocks import Block, Table, number
from hf_rb.report.figures import curves
from hf_rb.report.sources import Source


TITLE = "Training"
# In this order; what else a run has logged follows. Numbers with a slash are a method's or a tool's.
FIRST = (
    "loss",
    "eval_loss",
    "reward",
    "mean_token_accuracy",
    "eval_mean_token_accuracy",
    "grad_norm",
    "learning_rate",
)
NEVER = {
    "forward_kl",
    "reverse_kl",
    "ce",
    "kd",
    "kept_fraction",
    "aux_loss",
    "step",
    "epoch",
    "total_flos",
    "num_tokens",
    "num_input_tokens_seen",
}
SHOWN = 10


def shows(source: Source) -> bool:
    return "loss" in {key for entry in source.log for key in entry}


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    keys = list(dict.fromkeys(key for source in sources for key in source.keys("") if _is_general(key)))
    keys = [key for key in FIRST if key in keys] + [key for key in keys if key not in FIRST]
    lines = [key for key in keys if any(len(source.series(key)[0]) > 1 for source in sources)]
    drawn = {
        key: {source.name: series for source in sources if (series := source.series(key))[0]} for key in lines[:SHOWN]
    }
    rows = [
        [source.name, key, number(y[0]), number(min(y)), number(max(y)), number(y[-1]), number(x[-1])]
        for key in keys
        for source in sources
        for x, y in [source.series(key)]
        if y
    ]
    headers = ["run", "number", "first", "lowest", "highest", "last", "at step"]
    if not named:
        headers, rows = headers[1:], [row[1:] for row in rows]
    figures = [curves(drawn, "What the run has logged, step by step.")] if drawn else []
    return [*figures, Table(headers, rows)]


def _is_general(key: str) -> bool:
    return (
        "/" not in key
        and key.removeprefix("eval_") not in NEVER
        and not key.endswith(("_runtime", "_per_second", "train_loss"))
    )
