"""`hf-rb sft` and the verbs like it: checks a recipe, then runs the trainer's script on it through
`accelerate launch`.
"""

import argparse
import subprocess
from pathlib import Path

from hf_rb.cli import schemas
from hf_rb.cli.check import add_local_code, check, read_overrides, read_recipe
from hf_rb.io.model_folder import check_models
from hf_rb.io.resources import find_recipe, resource_folder
from hf_rb.methods.recipes import flatten
from hf_rb.methods.registry import allow
from hf_rb.utils import compat


EXAMPLE = "hf-rb {verb} recipe.yaml --accelerate_config fsdp2 --learning_rate 1e-5"
# Accelerate would take these on a CPU anyway, after a warning of six lines.
CPU_DEFAULTS = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe of hf_rb")
    parser.add_argument(
        "--accelerate_config",
        metavar="FILE",
        help="a file of `accelerate config`, or the name of one that ships with hf_rb (recipes/accelerate_configs)",
    )
    parser.add_argument("--num_processes", help="processes to launch (default: what the accelerate config says)")
    if parser.get_default("verb") != "sft":
        add_local_code(parser)
    keys = "keys of hf_rb beside those of TRL, in the recipe or as `--key value`"
    parser.add_argument_group(keys, schemas.listing(parser.get_default("verb")))
    parser.set_defaults(overrides=[])
    parser.usage = f"{parser.prog} RECIPE [--accelerate_config FILE] [--num_processes N] [--key value ...]"


def run(args: argparse.Namespace) -> int:
    recipe = find_recipe(args.recipe)
    local_code = getattr(args, "allow_local_code", None) or []
    allow(local_code)
    values = flatten(read_recipe(recipe)) | read_overrides(args.overrides, args.verb)
    report = check(recipe, values, args.verb)
    report.show()
    if report.errors:
        return 2
    check_models(values)

    launch = ["--config_file", str(_accelerate_config(args.accelerate_config))] if args.accelerate_config else []
    if report.plan and not args.accelerate_config:  # which may know of devices that this machine shows nowhere
        args.overrides = [*args.overrides, *report.plan.cpu_arguments]
        if report.plan.device == "cpu" and not Path(compat.default_config_file).is_file():
            launch = CPU_DEFAULTS
    processes = ["--num_processes", args.num_processes] if args.num_processes else []
    script = ["--module", f"hf_rb.scripts.{args.verb}", "--config", str(recipe), *args.overrides]
    script += [part for name in local_code for part in ("--allow_local_code", name)]
    return _launch([*launch, *processes, *script])


def _launch(arguments: list[str]) -> int:
    """Runs `accelerate launch` and returns the script's exit code; what went wrong, the script has printed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        compat.launch_command(compat.launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:  # one process
        code = error.returncode
    except ChildFailedError as error:  # several
        code = error.get_first_failure()[1].exitcode
    else:
        return 0
    return 2 if code == 2 else 1


def _accelerate_config(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    configs = {path.stem: path for path in sorted((resource_folder("recipes") / "accelerate_configs").glob("*.yaml"))}
    if name not in configs:
        raise FileNotFoundError(f"No accelerate config {name!r}: give a file, or one of {', '.join(configs)}.")
    return configs[name]
