"""`hf-rb export`: writes a quantized model in a format of other programs."""

import argparse

from hf_rb.io.model_folder import find_packed


EXAMPLE = "hf-rb export outputs/student-ptqtp outputs/student-gptq --format gptq"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a model quantized with --scale-mode tied: a folder or a Hub id"
    )
    parser.add_argument("destination", metavar="DEST", help="folder for the exported model")
    parser.add_argument(
        "--format", choices=["gptq"], default="gptq", help="gptq: symmetric 4-bit codes, as GPTQ stores them (default)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")


def run(args: argparse.Namespace) -> int:
    find_packed(args.model, args.destination, args.overwrite)  # told before torch is imported

    from hf_rb.quantizers import export_gptq

    size = export_gptq(args.model, args.destination, overwrite=args.overwrite)
    print(f"Saved in {args.destination}: {size.file_bytes:,} bytes, {size.bits_per_weight:.2f} bits per weight.")
    print(
        "transformers loads it where `optimum` and `gptqmodel` are installed (tried with 2.3 and 7.7, on a CPU); its "
        "card shows how."
    )
    return 0
