"""`optimum-cli ptqtp`, `optimum-cli d2quant`, and so for every quantizer: `hf-rb quantize` where optimum's users look
for it.

An installation puts this file into optimum's namespace, as `optimum/commands/register/register_hf_rb.py`, whose files
optimum imports for its `REGISTER_COMMANDS`. Imported by every `optimum-cli`, so nothing heavy here. There the file
also makes a package `optimum` out of nothing, so the real one is a dependency of ours.
"""

import sys
from argparse import ArgumentParser, Namespace
from typing import cast

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hf_rb import cli
from hf_rb.methods import Method
from hf_rb.methods.registry import methods
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


def _command(name: str, method: Method, package: str) -> type[_Quantize]:
    info = CommandInfo(name=name, help=f"Quantize a model with {method.name} ({package}) and save it.")
    return type(f"{name}Command", (_Quantize,), {"COMMAND": info, "__doc__": f"`optimum-cli {name} MODEL DEST`."})


REGISTER_COMMANDS = (
    [_command(name, entry.method, entry.package) for name, entry in methods("quantizer").items()] if _works else []
)
