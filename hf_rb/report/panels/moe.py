"""Mixtures of experts: the load of every expert and where routers point, from `hf-rb router-report` and from the
log.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_rb.report.blocks import Block, Table, Text, number
from hf_rb.report.figures import curves, heat_map
from hf_rb.report.panels import each
from hf_rb.report.panels._tokens import logged
from hf_rb.report.sources import Source


TITLE = "Mixture of experts: the router doctor"
KEYS = ("layers", "tokens", "mpi")
COLUMNS = {
    "max_vio": "MaxVio",
    "batch_max_vio": "of a batch",
    "dead": "dead",
    "load_entropy": "load entropy",
    "entropy": "entropy",
    "row_cosine": "|cos| of rows",
    "lambda_learned": "λ learned",
    "lambda_effective": "λ effective",
    "lambda_random": "λ random, one step",
}


def shows(source: Source) -> bool:
    return bool(source.find(*KEYS)) or bool(source.keys("router/"))


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    return each(sources, _build, named)


def _build(source: Source) -> list[Block]:
    # Per layer, as `RouterDoctorCallback(per_layer=True)` logs, is a map; the means over layers are curves.
    means = [key for key in source.keys("router/") if key.count("/") == 1]
    blocks = (
        logged(source, *means, caption="Means over the layers, of the tokens since the log before.") if means else []
    )
    if "aux_loss" in {key for entry in source.log for key in entry} and not means:
        blocks += logged(source, "aux_loss", caption="Balance loss.")
    blocks += _over_time(source)
    for report in source.find(*KEYS):
        blocks += _doctor(report)
    return blocks


def _over_time(source: Source) -> list[Block]:
    keys = [key for key in source.keys("router/") if key.count("/") > 1 and key.endswith("/max_vio")]
    steps = source.series(keys[0])[0] if keys else []
    if len(steps) < 2:
        return []
    rows, names = [source.series(key)[1] for key in keys], [key.split("/")[1] for key in keys]
    caption = f"MaxVio of every layer at {len(steps)} logs, steps {steps[0]} to {steps[-1]}."
    return [heat_map(rows, names, caption, "log")]


def _doctor(report: Mapping[str, Any]) -> list[Block]:
    layers = report["layers"]
    names = [layer["name"] for layer in layers]
    # 1 is an equal share.
    load = [[share * len(layer["load"]) for share in layer["load"]] for layer in layers]
    rows = [[layer["name"], *(number(layer.get(key), 3) for key in COLUMNS)] for layer in layers]
    data = f" of {report['data']}" if report.get("data") else ""
    kind = "MPI" if report["mpi"] else "ordinary"
    blocks: list[Block] = [
        Table(["layer", *COLUMNS.values()], rows, f"{report['tokens']:,} tokens{data}; {kind} routers."),
        heat_map(load, names, "Load of every expert: 1 (white) is an equal share.", "expert", center=1.0),
    ]
    lines = {
        COLUMNS[key]: (range(len(layers)), [layer[key] for layer in layers])
        for key in ("lambda_learned", "lambda_effective", "lambda_random")
        if all(layer.get(key) is not None for layer in layers)
    }
    if lines:
        caption = (
            "How far a router's rows point where their experts respond. One power step raises λ of any row: compare "
            "with it."
        )
        blocks.append(curves({"λ": lines}, caption, "layer"))
    return blocks + [Text(note) for note in report.get("notes", [])]
