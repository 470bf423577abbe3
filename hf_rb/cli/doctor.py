"""`hf-rb doctor`: versions and findings on what is installed, fit for a bug report."""

import argparse
import os
from dataclasses import asdict

from hf_rb.utils.output import json_text


EXAMPLE = "hf-rb doctor --json"

MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print versions and findings as JSON")


def run(args: argparse.Namespace) -> int:
    # Everything is embedded: nothing may go online. Set before anything of the Hugging Face stack is imported.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

    from hf_rb.scripts.doctor import environment, examination

    versions, findings, group = environment(), [], None
    if not args.json:
        print("\n".join(f"{name:<17} {version}" for name, version in versions.items()))
    for finding in examination():
        findings.append(finding)
        if args.json:
            continue
        if finding.group != group:
            group = finding.group
            print(f"\n{group}")
        detail = f": {finding.detail}" if finding.detail else ""
        print(f"  {MARKS[finding.state]:<7} {finding.name}{detail} ({finding.seconds:.1f} s)", flush=True)
    counts = {state: sum(finding.state == state for finding in findings) for state in MARKS}
    if args.json:
        print(json_text({"versions": versions, "verdicts": [asdict(one) for one in findings], "counts": counts}))
    else:
        seconds = sum(finding.seconds for finding in findings)
        print(f"\n{', '.join(f'{count} {state}' for state, count in counts.items())}, {seconds:.0f} s")
    return 1 if counts["failed"] else 0
