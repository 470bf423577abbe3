"""`hf-rb dequantize`: writes a quantized model as an ordinary one."""

import argparse

from hf_rb.io.model_folder import find_packed
from hf_rb.utils.dtypes import WEIGHT_TYPES


EXAMPLE = "hf-rb dequantize outputs/student-ptqtp outputs/student-16bit --dtype bfloat16"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model that hf-rb quantized: a folder or a Hub id")
    parser.add_argument("destination", metavar="DEST", help="folder for the ordinary model")
    parser.add_argument("--dtype", choices=WEIGHT_TYPES, help="type of all weights (default: the model's)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")


def run(args: argparse.Namespace) -> int:
    find_packed(args.model, args.destination, args.overwrite)  # told before torch is imported

    from hf_rb.quantizers import dequantize_checkpoint

    size = dequantize_checkpoint(args.model, args.destination, dtype=args.dtype, overwrite=args.overwrite)
    print(f"Saved in {args.destination}: {size.file_bytes:,} bytes, {size.bits_per_weight:.2f} bits per weight.")
    print("It holds the values of the quantized model and loads without hf_rb.")
    return 0
