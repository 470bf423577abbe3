"""`hf-rb demo`: the whole package on a tiny model, without a download."""

import argparse
import os


EXAMPLE = "hf-rb demo --output runs/demo"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", default="runs/demo", help="folder to write to (default runs/demo)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is not empty")
    parser.add_argument("--seed", type=int, default=42, help="seed of the training (default 42)")
    parser.add_argument("--problems", type=int, default=300, help="held-out problems to evaluate on (default 300)")
    parser.add_argument("--max-steps", type=int, help="train only so many steps")


def run(args: argparse.Namespace) -> int:
    if args.problems < 1:
        raise ValueError(f"--problems {args.problems}: write 1 or more.")
    # Everything is embedded: nothing may go online. Set before anything of the Hugging Face stack is imported.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}

    from hf_rb.scripts.demo import demo

    steps = [] if args.max_steps is None else ["--max_steps", str(args.max_steps)]
    demo(
        args.output,
        problems=args.problems,
        train_arguments=["--seed", str(args.seed), *steps],
        overwrite=args.overwrite,
    )
    return 0
