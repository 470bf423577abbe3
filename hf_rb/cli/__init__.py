"""The command line `hf-rb`.

One verb is one module of this folder, imported when the verb is used. It defines

- `EXAMPLE`: one command line, shown by `--help`; `{verb}` in it stands for the verb, for modules that serve several;
- `configure(parser)`: adds the verb's arguments;
- `run(args) -> int`: does the work and returns the exit code; heavy imports go inside. `args.verb` is the verb.

A verb that passes unknown arguments on, as the trainers' verbs do, sets the default `overrides=[]`.
"""

import argparse
import sys
import traceback
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from hf_rb.utils import versions


__all__ = ["VERBS", "configure", "main", "parse", "run"]

VERBS = {
    "demo": ("hf_rb.cli.demo", "Fine-tune, quantize and evaluate a tiny model in about three minutes on a CPU."),
    "check": ("hf_rb.cli.check", "Check a recipe in under a second, without loading anything."),
    "sft": ("hf_rb.cli.train", "Fine-tune a model from a recipe."),
    "gkd": ("hf_rb.cli.train", "Distil a teacher into a model from a recipe."),
    "distillation": ("hf_rb.cli.train", "Distil a teacher into a model, on what the model writes."),
    "grpo": ("hf_rb.cli.train", "Train a model by rewards, with shaped advantages, from a recipe."),
    "audit": ("hf_rb.cli.audit", "Compare every way in which a distillation recipe computes its loss."),
    "cache-teacher": ("hf_rb.cli.cache_teacher", "Run a teacher once over the data, and train without it."),
    "quantize": ("hf_rb.cli.quantize", "Quantize a model and save it."),
    "dequantize": ("hf_rb.cli.dequantize", "Write a quantized model as an ordinary one."),
    "export": ("hf_rb.cli.export", "Write a quantized model in the format of GPTQ."),
    "upcycle": ("hf_rb.cli.upcycle", "Make a mixture of experts from a dense model."),
    "router-report": ("hf_rb.cli.router_report", "Look at the routers of a mixture of experts."),
    "merge": ("hf_rb.cli.merge", "Make models from models, without training."),
    "recover": ("hf_rb.cli.recover", "Quantize a model and win the loss back by distillation."),
    "eval": ("hf_rb.cli.eval", "Measure perplexity, accuracy, size and speed of a model."),
    "report": (
        "hf_rb.cli.report",
        "Write one HTML file about runs and models: curves, tokens, advantages, errors, routers.",
    ),
    "push": ("hf_rb.cli.push", "Upload a model or an adapter to the Hub."),
    "methods": ("hf_rb.cli.methods", "List the methods that are installed, with their papers."),
    "doctor": ("hf_rb.cli.doctor", "Print versions, and try what is installed: for a bug report."),
}

BAD_INPUT, INTERRUPTED = 2, 130  # 128 and the number of the signal, as shells have it


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 is success, 2 is bad input, 130 is Ctrl-C, 1 is anything
    else.
    """
    argv = sys.argv[1:] if argv is None else argv
    verb = ""  # until it is read
    try:
        verb = _overview().parse_args(argv[:1] or ["--help"]).verb
        if verb != "doctor":  # whose work it is to say more
            versions.check_versions()
        module = import_module(VERBS[verb][0])
        args = parse(verb, module, argv[1:])
    except SystemExit as stop:  # argparse has printed the help or the mistake
        return int(stop.code or 0)
    except versions.UnsupportedVersion as error:
        print(f"hf-rb {verb}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    return run(module, args)


def configure(parser: argparse.ArgumentParser, module: ModuleType, **options: Any) -> None:
    """Gives a parser the arguments of a verb's module, and those that every verb has."""
    module.configure(parser, **options)
    parser.set_defaults(command=parser.prog)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(module: ModuleType, args: argparse.Namespace) -> int:
    """Runs a verb's module and returns the exit code; what is wrong with the input is said in one line, without a
    traceback.
    """
    try:
        return module.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"{args.command}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        if args.debug:
            traceback.print_exc()
        print(f"{args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _verb(name: str) -> str:
    if name in VERBS:
        return name
    close = get_close_matches(name, VERBS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the verbs are {', '.join(VERBS)}."
    raise argparse.ArgumentTypeError(f"there is no verb {name!r}; {hint}")


def _overview() -> argparse.ArgumentParser:
    from hf_rb import __version__

    verbs = "\n".join(f"  {verb:<13} {help}" for verb, (_, help) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="hf-rb",
        usage="hf-rb <verb> [arguments]",
        description=f"verbs:\n{verbs}\n\n`hf-rb <verb> --help` shows a verb's arguments and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf_rb {__version__}")
    parser.add_argument("verb", type=_verb, help=argparse.SUPPRESS)
    return parser


def parse(verb: str, module: ModuleType, argv: list[str]) -> argparse.Namespace:
    """Parses the arguments of a verb; a mistake goes to stderr and ends the process, as argparse does."""
    parser = argparse.ArgumentParser(
        prog=f"hf-rb {verb}",
        description=VERBS[verb][1],
        epilog="example:\n  " + module.EXAMPLE.replace("{verb}", verb),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(verb=verb)
    configure(parser, module)
    args, unknown = parser.parse_known_args(argv)
    if unknown and not hasattr(args, "overrides"):
        options = [option for action in parser._actions for option in action.option_strings]
        close = get_close_matches(unknown[0], options, n=1)
        parser.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if unknown:
        if unknown[0] == argv[0] and hasattr(args, "recipe"):  # whose value, argparse takes for the recipe
            parser.error(f"the recipe comes first: `{parser.prog} RECIPE {argv[0]} ...`")
        args.overrides = unknown
    return args
