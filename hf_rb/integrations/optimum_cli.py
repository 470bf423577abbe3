"""`optimum-cli ptqtp` and `optimum-cli d2quant`: `hf-rb quantize` where optimum's users look for it.

An installation puts this file into optimum's namespace, as `optimum/commands/register/register_hf_rb.py`, whose files
optimum imports for its `REGISTER_COMMANDS`. Imported by every `optimum-cli`, so nothing heavy here. There the file
also makes a package `optimum` out of nothing, so the real one is a dependency of ours.
"""

import sys
from argparse import ArgumentParser, Namespace
from typing import cast

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hf_rb import cli
from hf_rb.utils.versions import UnsupportedVersion


try:
    from hf_rb.cli import quantize
except UnsupportedVersion:  # not the concern of optimum's own commands
    _works = False
else:
    _works = True


__all__ = ["REGISTER_COMMANDS"]


class _Quantize(BaseOptimumCLICommand):
    def parse_args(self, parser: ArgumentParser) -> None:  # pyrefly: ignore[bad-override]  (optimum calls it on self)
        cli.configure(parser, quantize, method=self.COMMAND.name)

    def run(self) -> None:
        sys.exit(cli.run(quantize, cast(Namespace, self.args)))


class PTQTPCommand(_Quantize):
    """`optimum-cli ptqtp MODEL DEST`."""

    COMMAND = CommandInfo(name="ptqtp", help="Quantize a model to ternary planes (PTQTP, hf_rb) and save it.")


class D2QuantCommand(_Quantize):
    """`optimum-cli d2quant MODEL DEST --dataset TEXT`."""

    COMMAND = CommandInfo(name="d2quant", help="Quantize a model to 2 or 3 bits (D²Quant, hf_rb) and save it.")


REGISTER_COMMANDS = [PTQTPCommand, D2QuantCommand] if _works else []
