"""`hf-rb eval`: measures one model."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path


EXAMPLE = "hf-rb eval tiny:student --task tiny:math --limit 200 --speed"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="tiny:student, a model folder (quantized ones too) or a Hub id")
    parser.add_argument("--task", help="exact match on tiny:math, or on a JSON-lines file in the format of GSM8K")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT problems of the task")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="limit of a generated solution (default 256)")
    parser.add_argument("--batch-size", type=int, default=64, help="problems solved at a time (default 64)")
    parser.add_argument("--perplexity", metavar="FILE", help="perplexity of a text file")
    parser.add_argument("--window", type=int, default=512, help="window of the perplexity in tokens (default 512)")
    parser.add_argument("--stride", type=int, help="distance between windows (default: the window)")
    parser.add_argument("--speed", action="store_true", help="decoding speed")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="default: as saved"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", metavar="FILE", help="write everything measured, generated texts included, as JSON")


def run(args: argparse.Namespace) -> int:
    # What can be wrong without a model is looked at before one is loaded.
    if args.perplexity and not Path(args.perplexity).is_file():
        raise FileNotFoundError(f"There is no text file {args.perplexity}.")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: there is no folder {Path(args.out).parent}.")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: write 1 or more.")

    from hf_rb import evaluation

    rows = evaluation.load_task(args.task, args.limit) if args.task else None
    text = Path(args.perplexity).read_text(encoding="utf-8") if args.perplexity else None
    folder = evaluation.find_model(args.model)
    measured = {"size": evaluation.model_size(folder)}
    if rows or text or args.speed:
        model, tokenizer = evaluation.load_model(folder, args.dtype)
    else:
        print("Only the size was measured; add --task, --perplexity or --speed for more.", file=sys.stderr)
    if rows:
        measured["exact_match"] = evaluation.exact_match(model, tokenizer, rows, args.max_new_tokens, args.batch_size)
    if text:
        stride = args.window if args.stride is None else args.stride
        measured["perplexity"] = evaluation.perplexity(model, tokenizer, text, args.window, stride)
    if args.speed:
        measured["speed"] = evaluation.decode_speed(model)

    everything = {"model": args.model, "task": args.task} | {key: asdict(value) for key, value in measured.items()}
    if args.out:
        Path(args.out).write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    if args.json:
        for key in ("completions", "correct"):  # thousands of lines that only --out keeps
            everything.get("exact_match", {}).pop(key, None)
        print(json.dumps(everything, indent=2))
    else:
        print(evaluation.format_table(["measure", args.model], list(_rows(measured))))
    return 0


def _rows(measured: dict):
    if match := measured.get("exact_match"):
        yield f"exact match, {match.count} problems", f"{match.accuracy:.1%}"
        if len(match.by_kind) > 1:
            yield from ((f"  {kind}", f"{accuracy:.1%}") for kind, accuracy in match.by_kind.items())
        if match.lenient_accuracy != match.accuracy:
            yield "  last number where #### is missing", f"{match.lenient_accuracy:.1%}"
        yield "  ended before the token limit", f"{match.finished:.1%}"
    if result := measured.get("perplexity"):
        yield f"perplexity, window {result.window}, stride {result.stride}", f"{result.perplexity:.4g}"
        yield "  nats per token", f"{result.nats_per_token:.4f}"
        yield "  bits per byte", f"{result.bits_per_byte:.4f}"
        yield "  scored tokens", f"{result.tokens:,}"
    if speed := measured.get("speed"):
        yield f"decoding, batch {speed.batch_size}, tokens/s", f"{speed.tokens_per_second:.0f} ±{speed.spread / 2:.0%}"
    size = measured["size"]
    yield "bytes of the weight files", f"{size.file_bytes:,}"
    yield "weights", f"{size.weights:,}"
    yield "true bits per weight", f"{size.bits_per_weight:.2f}"
    if size.quantized_bits_per_weight:
        yield "  of the quantized layers", f"{size.quantized_bits_per_weight:.2f}"
