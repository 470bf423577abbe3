"""`hf-rb cache-teacher`: runs the teacher of a GKD recipe once over its data, so that training needs no teacher."""

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hf_rb.utils.output import json_text


if TYPE_CHECKING:
    from hf_rb.teachers import CacheReport

EXAMPLE = "hf-rb cache-teacher akl/tiny-cpu outputs/teacher-cache --k 64"


def configure(parser: argparse.ArgumentParser) -> None:
    from hf_rb.cli.check import add_local_code

    parser.add_argument("recipe", help="a recipe of `hf-rb gkd`: a YAML file, or the name of a recipe of hf_rb")
    parser.add_argument(
        "folder",
        nargs="?",
        help="folder for the cache (default: the recipe's `teacher_cache`); goes on where it stopped",
    )
    parser.add_argument("--teacher_model_name_or_path", metavar="MODEL", help="the teacher (default: the recipe's)")
    parser.add_argument("--k", type=int, default=64, help="most probable tokens to keep (default 64), and the label")
    parser.add_argument(
        "--dtype", choices=["float16", "float32"], default="float16", help="of the log-probabilities (default float16)"
    )
    parser.add_argument("--batch_tokens", type=int, default=8192, help="tokens of a teacher's batch (default 8192)")
    parser.add_argument("--shard_tokens", type=int, default=131_072, help="predictions of a shard (default 131072)")
    parser.add_argument("--overwrite", action="store_true", help="replace another cache in the folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(overrides=[])
    add_local_code(parser)
    parser.usage = f"{parser.prog} RECIPE [FOLDER] [--teacher_model_name_or_path MODEL] [--k K] [--key value ...]"


def run(args: argparse.Namespace) -> int:
    from hf_rb.cli.check import check, read_overrides, read_recipe
    from hf_rb.io.model_folder import check_models
    from hf_rb.io.resources import find_recipe
    from hf_rb.methods.recipes import flatten
    from hf_rb.methods.registry import allow

    path = find_recipe(args.recipe)
    allow(args.allow_local_code)
    recipe = flatten(read_recipe(path))
    named = recipe.pop("teacher_model_name_or_path", None)
    teacher = args.teacher_model_name_or_path or named
    folder = args.folder or recipe.get("teacher_cache")
    if teacher is None:
        raise ValueError("There is no teacher. Pass `--teacher_model_name_or_path`, or set it in the recipe.")
    if folder is None:
        raise ValueError(
            "There is no folder for the cache. Write `hf-rb cache-teacher RECIPE FOLDER`, or `teacher_cache` in the "
            "recipe."
        )
    # The recipe is checked as one that trains from the cache, so that its faults are told before torch is imported.
    values = recipe | {"teacher_cache": folder} | read_overrides(args.overrides, "gkd")
    found = check(path, values, "gkd")
    if found.errors:
        found.show()
        return 2
    check_models(values | {"teacher_model_name_or_path": teacher})
    report = capture(recipe | {"teacher_cache": folder}, args.overrides, teacher, args)
    if args.json:
        print(json_text(asdict(report)))
    else:
        print(f"{_summary(report)}\n\n{_next_step(args, path, recipe, report.folder, has_teacher=named is not None)}")
    return 0


def capture(recipe: dict[str, Any], overrides: list[str], teacher: str, args: argparse.Namespace) -> "CacheReport":
    """Builds the trainer that will read the cache, but with the teacher itself, and captures that."""
    import yaml

    from hf_rb.scripts import gkd
    from hf_rb.teachers import cache_teacher

    with TemporaryDirectory() as scratch:
        path = Path(scratch, "recipe.yaml")
        path.write_text(yaml.safe_dump(recipe | {"output_dir": scratch, "report_to": "none"}), encoding="utf-8")
        script_args, config, *rest = gkd.prepare(["--config", str(path), *overrides])
        folder, config.teacher_cache, config.teacher_model_name_or_path = config.teacher_cache, None, teacher
        trainer = gkd.build(script_args, config, *rest)
        return cache_teacher(
            trainer,
            folder,
            k=args.k,
            dtype=args.dtype,
            batch_tokens=args.batch_tokens,
            shard_tokens=args.shard_tokens,
            overwrite=args.overwrite,
        )


def _summary(report: "CacheReport") -> str:
    facts = [
        ["predictions", f"{report.tokens:,} in {report.sequences:,} sequences"],
        ["shards", f"{report.shards}" + (f", of which {report.shards_kept} were there" if report.shards_kept else "")],
        ["files", f"{report.file_bytes:,} bytes, {report.bytes_per_token:.1f} for each prediction"],
        ["not stored", f"{report.tail_mass:.3%} of the teacher's probability"],
        ["truncation KL", f"{report.truncation_kl:.5f} nats for each prediction"],
        ["time", f"{report.seconds:.1f} s"],
    ]
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts)


def _next_step(args: argparse.Namespace, path: Path, recipe: dict[str, Any], folder: str, has_teacher: bool) -> str:
    """Returns the command that trains from the cache. `hf-rb gkd` takes one teacher, and a recipe's key can only be
    taken away by editing it.
    """
    from hf_rb.cli.check import read_overrides

    step, name = "Train from the cache:", args.recipe
    if has_teacher:
        copy, name = ("", name) if str(path) == name else ("a copy of ", "COPY")
        step = f"In {copy}{path}, remove the line `teacher_model_name_or_path: ...`. Then train from the cache:"
    command = ["hf-rb", "gkd", name, *args.overrides]
    if (recipe | read_overrides(args.overrides, "gkd")).get("teacher_cache") != folder:
        command += ["--teacher_cache", folder]
    return f"{step}\n{shlex.join(command)}"
