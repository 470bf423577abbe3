"""A trainer as the conformance tests see it: how it trains a few steps, and its rows, most of which follow from the records."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from helpers.seeded_runs import ARGUMENTS, logs_and_weights

from hf_rb.methods import Method
from hf_rb.trainers.common.configs import ConfigMixin, with_flags_of


__all__ = ["Described", "Row", "Run", "batch", "variants"]

STEPS = 2


@dataclass(frozen=True)
class Row:
    """
    A configuration of a trainer.

    Attributes:
        name (`str`): Its name in the tests.
        keys (`dict`): Fields of the config, and what the trainer takes beside it.
        methods (`tuple[str, ...]`): Keys of the records whose metrics it logs, the first its own.
        batches (`dict`, *optional*): Splits of its step, where the trainer's do not fit.
        group (`str`, *optional*): Rows of a group stand for each other where the fast tests choose. Defaults to the first method.
        minor (`bool`): Whether another row is like it but for the choice of a flag.
    """

    name: str
    keys: Mapping[str, Any]
    methods: tuple[str, ...] = ()
    batches: Mapping[str, Mapping[str, Any]] | None = None
    group: str = ""
    minor: bool = False


class Run(NamedTuple):
    """What is left of a training."""

    logs: list
    weights: dict
    trainer: Any
    card: str = ""


def batch(size: int, steps: int = 1, **more: Any) -> dict[str, Any]:
    """Fields of a split: rows of a micro-batch on a process, and micro-batches of a step."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **more}


def variants(method: Method) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields flags of a method with another value than the default, for those that have a few, with a name."""
    for one in dataclasses.fields(method.flags) if method.flags else ():
        others = one.metadata.get("choices", [True, False] if isinstance(one.default, bool) else ())
        for value in others:
            if value != one.default:
                yield f"{one.name.removeprefix(f'{method.key}_')} {value}", {one.name: value}


@dataclass
class Described:
    """
    Base of the descriptions.

    Attributes:
        name (`str`): The verb of the trainer.
        trainer, config, parent, parent_config (`type`): Our classes and TRL's.
        batches (`dict[str, dict]`): Splits of a step. All rows are trained alike in each of them, the first the reference; a
            name with `2 processes` is trained by two.
        rows (`dict[str, Row]`): By name.
        off (`dict[str, dict]`): Keys with which the trainer must be TRL's.
        injected (`type`): Our class with completions that follow from the prompts, where it samples any.
        theirs (`frozenset[str]`): Numbers with a name of ours that TRL logs, a mean over micro-batches.
        also (`tuple[str, ...]`): Beginnings of numbers of TRL's that do not depend on the split.
        rel, abs (`float`): How closely logged numbers agree.
        weights_abs (`float`): How closely weights agree, beside 1e-4 of themselves.
    """

    name: str
    trainer: type
    config: type
    parent: type
    parent_config: type
    batches: dict[str, dict[str, Any]]
    injected: type
    rows: dict[str, Row] = field(default_factory=dict)
    off: dict[str, dict[str, Any]] = field(default_factory=dict)
    theirs: frozenset[str] = frozenset()
    also: tuple[str, ...] = ()
    rel: float = 1e-4
    abs: float = 2e-6
    weights_abs: float = 2e-6
    models: Path = Path()

    def save_models(self, folder: Path) -> None:
        raise NotImplementedError

    def make(self, trainer_class: type, config_class: type, config: dict[str, Any], objects: dict[str, Any]) -> Any:
        """Makes a trainer. `objects` is what the keys of a row hold beside fields of the config."""
        raise NotImplementedError

    def data(self) -> Any:
        """Returns the rows that it trains on."""
        raise NotImplementedError

    def train(
        self, trainer_class: type | None = None, config_class: type | None = None, card: bool = False, **keys: Any
    ) -> Run:
        """Trains the saved model from the start. With `card` the run has its model card."""
        trainer_class, config_class = trainer_class or self.injected, config_class or self.config
        if issubclass(config_class, ConfigMixin):
            config_class = with_flags_of(config_class, keys)  # of methods of other packages
        own = {one.name for one in dataclasses.fields(config_class)}
        with tempfile.TemporaryDirectory() as folder:
            config = {**ARGUMENTS, "output_dir": folder, "max_steps": STEPS, **keys}
            objects = {key: config.pop(key) for key in [*config] if key not in own}
            trainer = self.make(trainer_class, config_class, config, objects)
            trainer.train(resume_from_checkpoint=config.get("resume_from_checkpoint"))
            if card:
                trainer.create_model_card()
            text = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8") if card else ""
        return Run(*logs_and_weights(trainer), trainer, text)

    def combinations(self, row: Row) -> Iterator[tuple[str, str]]:
        """Yields the splits of a row with the paths of the loss, the reference first."""
        paths = ("chunked", "dense") if "loss_impl" in {one.name for one in dataclasses.fields(self.config)} else ("",)
        return product(self.splits(row), paths)

    def splits(self, row: Row) -> Mapping[str, Mapping[str, Any]]:
        return row.batches or self.batches

    def train_row(self, row: Row, split: str = "whole", path: str = "", **keys: Any) -> Run:
        """Trains a row."""
        paths = {"loss_impl": path} if path else {}
        return self.train(**{**row.keys, **self.splits(row)[split], **paths, **keys})
