"""`hf-rb audit`: computes the loss of a distillation recipe in every way that there is, and compares.

Two batches of the recipe's data go through the formulas on all logits, and then through each path that a training run
can take. The models are the recipe's, in float32; the batches are small. A recipe that trains from a cache is compared
with the formulas on what the cache holds, and its teacher, where it can be loaded, with a cache of all its tokens.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_rb.utils.output import json_text


EXAMPLE = "hf-rb audit --config exopd/tiny-cpu"

# Values with which a recipe becomes a small run in float32 without vLLM.
_REPLACED = {
    "gradient_accumulation_steps": 1,
    "bf16": False,
    "fp16": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "dtype": "float32",
    "push_to_hub": False,
}
_ROWS_OF_DATA = 64


def configure(parser: argparse.ArgumentParser) -> None:
    from hf_rb.cli.check import add_local_code

    parser.add_argument("--config", metavar="RECIPE", help="a recipe of `hf-rb gkd` or `hf-rb distillation`")
    parser.add_argument("--batches", type=int, default=2, help="batches to compare (default 2)")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences of a batch (default 4)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="limit of a sampled completion (default 64)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest relative difference that is accepted (default 1e-4)"
    )
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")
    parser.set_defaults(overrides=[])
    add_local_code(parser)
    parser.usage = f"{parser.prog} --config RECIPE [--batches N] [--batch_size N] [--tolerance X] [--key value ...]"


def run(args: argparse.Namespace) -> int:
    from hf_rb.cli.check import check, read_overrides, read_recipe
    from hf_rb.io.model_folder import check_models
    from hf_rb.io.resources import find_recipe
    from hf_rb.methods.recipes import flatten
    from hf_rb.methods.registry import allow

    if args.config is None:
        given = args.overrides[:1]
        raise ValueError(f"Write `hf-rb audit --config {given[0] if given and given[0][0] != '-' else 'RECIPE'}`.")
    path = find_recipe(args.config)
    allow(args.allow_local_code)
    recipe = flatten(read_recipe(path))
    verb = check(path, recipe).verb
    if verb not in ("gkd", "distillation"):
        raise ValueError(
            f"{path} is a recipe for `hf-rb {verb}`. `hf-rb audit` is for those of `hf-rb gkd` and `hf-rb "
            "distillation`."
        )
    recipe |= read_overrides(args.overrides, verb)
    # Beside a cache, the model that was captured.
    captured = recipe.pop("teacher_model_name_or_path", None) if recipe.get("teacher_cache") else None
    report = check(path, recipe, verb)
    if report.errors:
        report.show()
        return 2
    check_models(recipe | ({"teacher_model_name_or_path": captured} if captured else {}))
    for note in make_small(recipe, verb, args.batch_size, args.max_new_tokens):
        print(note, file=sys.stderr)
    if plan := check(path, recipe, verb).plan:  # of the smaller recipe
        for line in [*plan.audit().memory_lines(), *plan.audit().problems()]:
            print(line, file=sys.stderr, flush=True)
    comparisons = _audit(recipe, verb, args.batches, captured)
    is_good = {one.path: max(one.loss, one.gradient) <= args.tolerance for one in comparisons}
    if args.json:
        rows = [asdict(one) | {"ok": is_good[one.path]} for one in comparisons]
        print(json_text({"recipe": str(path), "tolerance": args.tolerance, "paths": rows}))
    else:
        print(f"{'path':<24} {'loss':>10} {'gradient':>10}")
        for one in comparisons:
            mark = "" if is_good[one.path] else f"  above {args.tolerance:g}"
            print(f"{one.path:<24} {one.loss:>10.1e} {one.gradient:>10.1e}{mark}")
    return 0 if all(is_good.values()) else 1


def make_small(recipe: dict[str, Any], verb: str, batch_size: int, max_new_tokens: int) -> list[str]:
    """Changes the recipe for a small run; returns what the audit then leaves out."""
    recipe |= _REPLACED | {"per_device_train_batch_size": batch_size, "max_steps": 1}
    recipe["teacher_model_init_kwargs"] = (recipe.get("teacher_model_init_kwargs") or {}) | {"dtype": "float32"}
    length = "max_new_tokens" if verb == "gkd" else "max_completion_length"
    recipe[length] = min(recipe.get(length) or max_new_tokens, max_new_tokens)
    if not recipe.get("use_vllm"):
        return []
    for key in [key for key in recipe if key == "use_vllm" or key.startswith("vllm_")]:
        del recipe[key]
    if recipe.pop("gopd_tis_cap", None) is None:
        return []
    return ["`gopd_tis_cap` is left out: the audit samples without vLLM, where every importance weight is 1."]


def _audit(recipe: dict[str, Any], verb: str, batches: int, captured: str | None) -> list:
    from importlib import import_module

    import yaml

    from hf_rb.trainers.audit import audit

    script = import_module(f"hf_rb.scripts.{verb}")
    with TemporaryDirectory() as scratch:
        path = Path(scratch, "recipe.yaml")
        path.write_text(yaml.safe_dump(recipe | {"output_dir": scratch}), encoding="utf-8")
        *parsed, splits = script.prepare(["--config", str(path)])
        trainer = script.build(*parsed, [_first_rows(splits[0]), None])
        return audit(trainer, batches, _captured_teacher(trainer, captured) if recipe.get("teacher_cache") else None)


def _captured_teacher(trainer: Any, name: str | None) -> Any:
    """Returns the teacher that a cache was made with, as the recipe names it or else the cache; `None` if it is not
    here.
    """
    from hf_rb.teachers import LocalTeacher

    init_kwargs = {"trust_remote_code": trainer.args.trust_remote_code} | trainer.args.teacher_model_init_kwargs
    teacher = LocalTeacher(name or trainer.teacher.model_name, init_kwargs)
    try:
        teacher.prepare(trainer)
    except (OSError, ValueError) as error:
        if name is not None:
            raise
        print(
            "The cache is compared with the formulas on what it holds, and not with its teacher "
            f"{trainer.teacher.model_name!r}, which could not be loaded: pass `--teacher_model_name_or_path`. "
            f"({error})",
            file=sys.stderr,
        )
        return None
    return teacher


def _first_rows(dataset: Any) -> Any:
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return dataset.select(range(min(_ROWS_OF_DATA, len(dataset))))
    return Dataset.from_list(list(dataset.take(_ROWS_OF_DATA)))
