"""`hf-rb eval`: measures one model.

`--out` keeps everything as JSON; its list `results` is what model cards take (`hf_rb.hub.read_results`,
`hf-rb push --results`).
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_rb.io.files import check_new_file
from hf_rb.io.model_folder import adapter_beside, find_model, public_name
from hf_rb.utils.dtypes import WEIGHT_TYPES_OR_AUTO
from hf_rb.utils.output import json_text


EXAMPLE = "hf-rb eval tiny:student --task tiny:math --limit 200 --speed"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="tiny:student, a model folder (quantized ones too), a Hub id or a sweep"
    )
    parser.add_argument("--task", help="exact match on tiny:math, or on a JSON-lines file in the format of GSM8K")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT problems of each task")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="limit of a generated solution (default 256)")
    parser.add_argument("--batch-size", type=int, default=64, help="problems solved at a time (default 64)")
    parser.add_argument(
        "--perplexity",
        metavar="FILE",
        help="perplexity of a text file, in windows that begin with the tokenizer's BOS",
    )
    parser.add_argument(
        "--baseline",
        metavar="MODEL",
        help="the model that MODEL was made from: its perplexity is measured too, and the ratio said in words",
    )
    parser.add_argument(
        "--window", type=int, help="window of the perplexity in tokens (default 512, or what the model has room for)"
    )
    parser.add_argument("--stride", type=int, help="distance between windows (default: the window)")
    parser.add_argument(
        "--harness",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of lm-evaluation-harness, by name or as task files (.yaml)",
    )
    parser.add_argument(
        "--fewshot", type=int, help="examples in front of every harness question (default: the task's)"
    )
    parser.add_argument("--chat", action="store_true", help="render harness questions with the chat template")
    parser.add_argument(
        "--allow-local-code", action="store_true", help="let harness task files name Python functions beside them"
    )
    parser.add_argument("--speed", action="store_true", help="decoding speed")
    parser.add_argument("--dtype", choices=WEIGHT_TYPES_OR_AUTO, default="auto", help="default: as saved")
    parser.add_argument("--plot", metavar="FILE", help="of a sweep: draw what was measured against lambda, as SVG")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", metavar="FILE", help="write everything measured, generated texts included, as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    # Mistakes that need no model to be seen are refused before one is loaded.
    if args.perplexity and not Path(args.perplexity).is_file():
        raise FileNotFoundError(f"There is no text file {args.perplexity}.")
    if args.task and not args.task.startswith("tiny:") and not Path(args.task).is_file():
        raise FileNotFoundError(
            f"There is no task file {args.task}: write tiny:math or the path of a JSON-lines file."
        )
    for name in ("out", "plot"):
        if path := getattr(args, name):
            check_new_file(path, f"--{name}", args.overwrite)
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("limit", 1), ("fewshot", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: write {least} or more.")
    for name in ("fewshot", "chat", "allow_local_code"):
        if getattr(args, name) not in (None, False) and not args.harness:
            raise ValueError(f"--{name.replace('_', '-')} is for --harness: add --harness TASK, or leave it out.")
    if args.baseline and not args.perplexity:
        raise ValueError("--baseline is compared by perplexity: add --perplexity FILE, or leave it out.")

    from hf_rb.weights.sweep import read_sweep

    sweep = read_sweep(args.model)
    folders = sweep or {None: find_model(args.model)}
    if args.plot and (sweep is None or not (args.task or args.perplexity or args.speed)):
        raise ValueError(
            f"--plot draws what --task, --perplexity or --speed measures against lambda, and {args.model} "
            + (
                "is asked for none of them."
                if sweep
                else "is no sweep: `hf-rb merge ... --lambda 0.2,0.5,0.8` writes one."
            )
        )

    from transformers import AutoConfig

    from hf_rb import evaluation
    from hf_rb.io.model_class import check_causal

    if flags := [f"`--{name}`" for name in ("task", "perplexity", "harness", "speed") if getattr(args, name)]:
        for folder in folders.values():
            check_causal(AutoConfig.from_pretrained(folder), f"Measuring {', '.join(flags)}")
    rows = evaluation.load_task(args.task, args.limit) if args.task else None
    text = Path(args.perplexity).read_text(encoding="utf-8") if args.perplexity else None
    if not (rows or text or args.speed or args.harness):
        print("Only the size was measured; add --task, --perplexity, --harness or --speed for more.", file=sys.stderr)
    baseline = _baseline(args, text or "", folders.values()) if args.baseline else None
    measured = {lam: _measure(folder, args, rows, text, baseline) for lam, folder in folders.items()}

    everything = {"model": public_name(args.model), "task": args.task and public_name(args.task)}
    if baseline:
        everything["baseline"] = {"model": public_name(args.baseline)} | asdict(baseline)
    results = {lam: {key: _plain(value) for key, value in values.items()} for lam, values in measured.items()}
    if sweep:
        everything["sweep"] = [{"lambda": lam} | result for lam, result in results.items()]
    else:
        everything |= {"results": _plain(list(_results(measured[None], args)))} | results[None]
    if args.out:
        Path(args.out).write_text(json_text(everything) + "\n", encoding="utf-8")
    if args.plot:
        evaluation.plot_curves(
            args.plot, [lam for lam in folders if lam is not None], _curves(list(measured.values())), "lambda"
        )
    if args.json:
        for result in results.values():
            for key in ("completions", "correct"):  # thousands of lines that only --out keeps
                result.get("exact_match", {}).pop(key, None)
        print(json_text(everything))
    elif sweep:
        names, *_ = ([name for name, _ in _rows(values)] for values in measured.values())
        columns = [[value for _, value in _rows(values)] for values in measured.values()]
        cells = [[name, *values] for name, *values in zip(names, *columns, strict=True)]
        print(evaluation.format_table(["lambda", *(f"{lam:g}" for lam in measured)], cells))
    else:
        print(evaluation.format_table(["measure", args.model], list(_rows(measured[None]))))
        if baseline:
            print(f"\n{measured[None]['quality']}")
    return 0


def _baseline(args: argparse.Namespace, text: str, folders: Iterable[Path]) -> Any:
    """Measures the perplexity of the model to compare with, whose tokens have to be those of the others."""
    from transformers import AutoTokenizer

    from hf_rb import evaluation

    source = evaluation.find_model(args.baseline)
    tokenizers: list[Any] = [AutoTokenizer.from_pretrained(one) for one in (source, *folders)]
    ours, *others = (tokenizer(text, verbose=False)["input_ids"] for tokenizer in tokenizers)
    if any(other != ours for other in others):
        raise ValueError(
            f"--baseline {args.baseline} makes other tokens of {args.perplexity} than {args.model}, so their "
            "perplexities do not compare: give the model that it was made from, or compare the bits per byte of two "
            "calls."
        )
    start = time.perf_counter()
    measured = _perplexity(*_load(source, args.dtype), args, text)
    print(f"The baseline was loaded and measured in {time.perf_counter() - start:.1f} s.", file=sys.stderr)
    return measured


def _perplexity(model: Any, tokenizer: Any, args: argparse.Namespace, text: str) -> Any:
    from hf_rb import evaluation

    return evaluation.perplexity(model, tokenizer, text, args.window, args.stride)


def _measure(
    folder: Path, args: argparse.Namespace, rows: list | None, text: str | None, baseline: Any = None
) -> dict:
    from hf_rb import evaluation

    measured: dict[str, Any] = {"size": evaluation.model_size(folder)}
    model: Any = None
    tokenizer: Any = None
    if rows or text or args.speed or args.harness:
        model, tokenizer = _load(folder, args.dtype)
    if rows:
        measured["exact_match"] = evaluation.exact_match(model, tokenizer, rows, args.max_new_tokens, args.batch_size)
    if text:
        measured["perplexity"] = _perplexity(model, tokenizer, args, text)
    if baseline:
        window, found = measured["perplexity"].window, measured["perplexity"].perplexity
        if window != baseline.window:
            raise ValueError(
                f"{folder} has room for windows of {window} tokens and --baseline {args.baseline} for "
                f"{baseline.window}: write `--window {min(window, baseline.window)}`, so that their perplexities "
                "compare."
            )
        measured["quality"] = evaluation.judge(found, baseline.perplexity, _name(args.baseline))
    if args.harness:
        options = {"fewshot": args.fewshot, "chat": args.chat, "allow_local_code": args.allow_local_code}
        measured["harness"] = evaluation.run_harness(model, tokenizer, args.harness, args.limit, **options)
    if args.speed:
        measured["speed"] = evaluation.decode_speed(model)
    return measured


def _load(folder: Path, dtype: str) -> tuple[Any, Any]:
    if not adapter_beside(folder):
        from hf_rb.evaluation import load_model

        return load_model(folder, dtype)
    from hf_rb.recover import load_recovered  # a folder of `hf-rb recover` is a base with its adapter

    print(f"Measured with the adapter in {folder}, whose bytes count.", file=sys.stderr)
    return load_recovered(folder, dtype=dtype)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return [asdict(one) for one in value] if isinstance(value, list) else asdict(value)


def _results(measured: dict, args: argparse.Namespace) -> Iterator[Any]:
    """Returns the measurements as a model card says them."""
    from hf_rb.hub import Result

    if match := measured.get("exact_match"):
        yield Result(f"exact match ({match.count} problems)", match.accuracy, _name(args.task))
    if result := measured.get("perplexity"):
        begins = f", each begins with {result.begins_with}" if result.begins_with else ""
        how = f"window {result.window}, stride {result.stride}{begins}, {result.bytes_per_token:.2f} bytes a token"
        yield Result(f"perplexity ({how})", result.perplexity, _name(args.perplexity))
    for score in measured.get("harness", ()):
        how = [f"{score.fewshot}-shot"] * (score.fewshot is not None) + [f"first {args.limit}"] * bool(args.limit)
        yield Result(f"{score.metric} ({', '.join(how)})" if how else score.metric, score.value, score.task)


def _name(data: str) -> str:
    """The name of a task, a file or a model, without the folders above it."""
    return data if data.startswith("tiny:") else Path(data).name


def _curves(measured: list[dict]) -> dict[str, list[float]]:
    shown = {
        "exact match": lambda values: values["exact_match"].accuracy,
        "ended before the token limit": lambda values: values["exact_match"].finished,
        "perplexity": lambda values: values["perplexity"].perplexity,
        "tokens a second": lambda values: values["speed"].tokens_per_second,
    }
    keys = dict(zip(shown, ("exact_match", "exact_match", "perplexity", "speed"), strict=True))
    return {name: [show(one) for one in measured] for name, show in shown.items() if keys[name] in measured[0]}


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
        if quality := measured.get("quality"):
            yield f"  times that of {quality.original}", f"{quality.times:.4g}, {quality.word}"
        if result.begins_with:
            yield "  each window begins with", result.begins_with
        yield "  bytes per token", f"{result.bytes_per_token:.3f}"
        yield "  nats per token", f"{result.nats_per_token:.4f}"
        yield "  bits per byte", f"{result.bits_per_byte:.4f}"
        yield "  scored tokens", f"{result.tokens:,}"
    for score in measured.get("harness", ()):
        error = "" if score.stderr is None else f" ±{score.stderr:.4f}"
        few = "" if score.fewshot is None else f", {score.fewshot}-shot"
        yield f"{score.task}, {score.metric}{few}, {score.count} questions", f"{score.value:.4f}{error}"
    if speed := measured.get("speed"):
        yield f"decoding, batch {speed.batch_size}, tokens/s", f"{speed.tokens_per_second:.0f} ±{speed.spread / 2:.0%}"
    size = measured["size"]
    yield "bytes of the weight files", f"{size.file_bytes:,}"
    yield "weights", f"{size.weights:,}"
    yield "true bits per weight", f"{size.bits_per_weight:.2f}"
    if size.quantized_bits_per_weight:
        yield "  of the quantized layers", f"{size.quantized_bits_per_weight:.2f}"
