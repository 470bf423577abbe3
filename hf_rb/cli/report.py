"""`hf-rb report`: one HTML file about runs and models, and the same as Markdown."""

import argparse
import json
from pathlib import Path

from hf_rb.io.files import check_new_file


EXAMPLE = "hf-rb report outputs/profit-tiny outputs/profit-tiny-lower --out report.html"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        metavar="RUN_OR_MODEL",
        nargs="+",
        help="the output_dir of a run, a model's folder, or a JSON file of `hf-rb eval`, `quantize` or "
        "`router-report`",
    )
    parser.add_argument(
        "--out", metavar="FILE", default="report.html", help="HTML file to write (default report.html)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.suffix != ".html":
        raise ValueError(
            f"--out {args.out}: the report is an HTML file, with Markdown beside it; write {out.with_suffix('.html')}."
        )
    for path in (out, out.with_suffix(".md")):
        check_new_file(path, "--out", args.overwrite)

    from hf_rb.report import write_report

    html, markdown = write_report(args.sources, out)
    if args.json:
        print(json.dumps({"html": str(html), "markdown": str(markdown)}))
    else:
        print(f"Wrote {html} ({html.stat().st_size / 1024:.0f} kB, nothing outside it is needed) and {markdown}.")
    return 0
