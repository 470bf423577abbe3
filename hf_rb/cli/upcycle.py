"""`hf-rb upcycle`: makes a mixture of experts from a dense model, saves it with its tokenizer, and says what came of
it.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_rb.cli.check import check, read_recipe, upcycle_rules
from hf_rb.io.files import check_replaceable
from hf_rb.io.model_folder import check_apart, find_model
from hf_rb.io.resources import find_recipe
from hf_rb.utils.fields import described, documented, flag, validate
from hf_rb.utils.output import json_text


if TYPE_CHECKING:
    from hf_rb.models.upcycle import UpcycleReport

__all__ = ["UpcycleArguments"]

EXAMPLE = "hf-rb upcycle tiny:student outputs/student-moe --experts 8 --top-k 2 --splits 2"


@documented
@dataclass
class UpcycleArguments:
    """
    The keys of a recipe for `hf-rb upcycle`.

    Args:
        model_name_or_path (`str`):
            Dense model: a folder, a Hub id or an embedded one (`tiny:student`).
        output_dir (`str`):
            Folder for the mixture.
    """

    model_name_or_path: str = field(metadata=described("Dense model: a folder, a Hub id or an embedded one."))
    output_dir: str = field(metadata=described("Folder for the mixture."))
    num_experts: int = flag(8, "Experts of a layer, a multiple of `splits`.", range="[2, inf)")
    top_k: int = flag(2, "Experts that a token uses.", range="[1, inf)")
    splits: int = flag(
        1, "Parts into which the neurons of an MLP are cut: 1 copies, `num_experts` splits.", range="[1, inf)"
    )
    mpi: bool = flag(False, "Whether the routers are MPI's.")
    seed: int = flag(0, "Seed of the routers.")
    overwrite: bool = flag(False, "Whether to replace a folder that is not empty.")

    def __post_init__(self):
        validate(self, upcycle_rules)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="tiny:student, a model folder or a Hub id")
    parser.add_argument("destination", metavar="DEST", nargs="?", help="folder for the mixture")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file or a recipe of hf_rb; arguments override it")
    parser.add_argument("--experts", type=int, metavar="N", help="experts of a layer (default 8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts that a token uses (default 2)")
    parser.add_argument("--splits", type=int, metavar="S", help="parts of an MLP: 1 copies (default), N splits")
    parser.add_argument("--mpi", action="store_true", help="write a model with MPI routers")
    parser.add_argument("--seed", type=int, help="seed of the routers (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    arguments = _read_arguments(args)
    check_apart(find_model(arguments.model_name_or_path), Path(arguments.output_dir))
    check_replaceable(Path(arguments.output_dir).resolve(), arguments.overwrite)

    from hf_rb.models.upcycle import upcycle

    report = upcycle(
        arguments.model_name_or_path,
        arguments.output_dir,
        arguments.num_experts,
        arguments.top_k,
        splits=arguments.splits,
        mpi=arguments.mpi,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    print(json_text(report.to_dict()) if args.json else _summary(report, arguments.output_dir))
    return 0


def _read_arguments(args: argparse.Namespace) -> UpcycleArguments:
    values = read_recipe(find_recipe(args.config)) if args.config else {}
    given = {
        "model_name_or_path": args.model,
        "output_dir": args.destination,
        "num_experts": args.experts,
        "top_k": args.top_k,
        "splits": args.splits,
        "mpi": args.mpi or None,
        "seed": args.seed,
        "overwrite": args.overwrite or None,
    }
    values |= {key: value for key, value in given.items() if value is not None}
    errors = check(Path(args.config or "the command line"), values, "upcycle").errors
    if any(message.endswith("is missing.") for message in errors):
        errors.append("Write `hf-rb upcycle MODEL DEST`, or give a recipe that names both with `--config`.")
    if errors:
        raise ValueError("\n".join(errors))
    return UpcycleArguments(**values)


def _summary(report: "UpcycleReport", folder: str) -> str:
    from hf_rb.evaluation import format_table

    rows = [
        ["experts, used by a token", f"{report.num_experts}, {report.top_k}"],
        ["splits of an MLP", str(report.splits)],
        ["parameters", f"{report.parameters:,}; before {report.dense_parameters:,}"],
        ["  used by a token", f"{report.active_parameters:,}"],
        ["starts as the dense model", "yes, up to rounding" if report.exact else "no"],
        ["|cos| of learned rows", f"{report.row_cosine:.3f}"],
        ["  as MPI would use them", f"{report.effective_row_cosine:.3f}"],
    ]
    table = format_table(["upcycled", "MPI" if report.mpi else "ordinary routers"], rows)
    loading = " Load it after `import hf_rb`." if report.mpi else ""
    return f"{table}\n\nSaved in {folder}.{loading}"
