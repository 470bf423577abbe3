"""`hf-rb router-report`: looks at the routers of a mixture of experts while it reads some text."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hf_rb.io.data_files import text_problem
from hf_rb.io.files import check_new_file
from hf_rb.io.model_folder import find_model, public_name
from hf_rb.utils.dtypes import WEIGHT_TYPES_OR_AUTO
from hf_rb.utils.output import json_text


if TYPE_CHECKING:
    from hf_rb.models.router_report import RouterReport

EXAMPLE = "hf-rb router-report tiny:moe tiny:math --json"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="tiny:moe, a model folder or a Hub id")
    parser.add_argument(
        "data", metavar="DATA", help="tiny:math, a text or JSON-lines file, or a dataset (NAME:CONFIG)"
    )
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens to read (default 16384)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a sequence (default 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a batch (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random rows (default 0)")
    parser.add_argument("--dtype", choices=WEIGHT_TYPES_OR_AUTO, default="auto", help="default: as saved")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", metavar="FILE", help="write the JSON to a file too")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(args: argparse.Namespace) -> int:
    for name, least in (("tokens", 2), ("window", 2), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: write {least} or more.")
    if args.out:
        check_new_file(args.out, "--out", args.overwrite)
    folder = find_model(args.model)
    if problem := text_problem("DATA", args.data):
        raise ValueError(problem)

    import torch
    from transformers import AutoConfig

    from hf_rb import evaluation
    from hf_rb.io.model_class import skeleton
    from hf_rb.io.texts import read_texts
    from hf_rb.models.router_report import RouterMeter, examine
    from hf_rb.utils.progress import tqdm
    from hf_rb.utils.special_tokens import cut, special_tokens

    RouterMeter(skeleton(AutoConfig.from_pretrained(folder))).close()  # a dense model is refused before it is loaded
    texts = None if args.data.startswith("tiny:") else read_texts(args.data, "test")  # before a model is loaded
    model, tokenizer = evaluation.load_model(folder, args.dtype)
    if texts is None:
        pairs = evaluation.solutions(tokenizer, evaluation.load_task(args.data))
        texts = [context + solution for solution, context in zip(*pairs, strict=True)]
    added = special_tokens(tokenizer)
    ids = added.around(tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])[
        : args.tokens
    ]
    rows = torch.tensor(list(cut(ids, added.head, min(args.window, len(ids))))).to(model.device)
    batches = tqdm(rows.split(args.batch_size), desc="router-report", delay=2, leave=False, disable=None)
    report = examine(model, ({"input_ids": batch} for batch in batches), args.seed)

    text = json_text({"model": public_name(args.model), "data": public_name(args.data)} | report.to_dict())
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    print(text if args.json else _table(report))
    return 0


COLUMNS = {
    "MaxVio": "max_vio",
    "of a batch": "batch_max_vio",
    "dead": "dead",
    "load entropy": "load_entropy",
    "entropy": "entropy",
    "|cos| of rows": "row_cosine",
    "λ learned": "lambda_learned",
    "λ effective": "lambda_effective",
    "λ random, one step": "lambda_random",
}


def _table(report: "RouterReport") -> str:
    from hf_rb.evaluation import format_table

    rows = [[layer.name, *(_cell(getattr(layer, name)) for name in COLUMNS.values())] for layer in report.layers]
    rows.append(["mean", *(_cell(report.mean(name)) for name in COLUMNS.values())])
    head = f"{report.tokens:,} tokens; {'MPI' if report.mpi else 'ordinary'} routers"
    return "\n".join([head, "", format_table(["layer", *COLUMNS], rows), *[f"\n{note}" for note in report.notes]])


def _cell(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
