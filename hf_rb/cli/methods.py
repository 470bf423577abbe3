"""`hf-rb methods`: the methods that are installed, ours and those of other packages."""

import argparse
import shutil
import textwrap

from hf_rb.methods.registry import GROUPS, PACKAGE, broken, entries
from hf_rb.utils.output import json_text


EXAMPLE = "hf-rb methods --json"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print records as JSON")


def run(args: argparse.Namespace) -> int:
    found = entries()
    problems = [problem for kind in GROUPS for problem in broken(kind).values()]
    if args.json:
        rows = [
            {
                "key": entry.method.key,
                "name": entry.method.name,
                "kind": entry.method.kind,
                "package": entry.package,
                "paper": entry.method.paper_url or None,
                "summary": entry.method.summary,
                "flags": [*getattr(entry.method.flags, "__dataclass_fields__", ())],
                "metrics": [metric.name for metric in entry.method.metrics],
            }
            for entry in found
        ]
        print(json_text({"methods": rows, "problems": problems}))
        return 0
    width = shutil.get_terminal_size().columns
    for kind in dict.fromkeys(entry.method.kind for entry in found):
        print(f"{kind}:")
        for entry in (one for one in found if one.method.kind == kind):
            method, source = entry.method, "" if entry.package == PACKAGE else f"[{entry.package}] "
            paper = method.paper.id if method.paper else "-"
            text = f"  {method.key:<16} {paper:<11}{source}{method.summary}"
            print(textwrap.fill(text, width, subsequent_indent=" " * 28, drop_whitespace=True))
    for problem in problems:
        print(f"warning: {problem}")
    return 0
