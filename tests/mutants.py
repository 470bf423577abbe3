"""
Small random changes of the package that some test should notice: `make mutants MUTANTS_ARGS="--seed 7 --count 20"`.

A process imports the libraries once. Every mutant is a fork of it, in which one module is compiled from changed source and its tests
run. Prints what was found and, of what was not, line, kind and source. Exit code 1 where fewer are found than a module's bar.
"""

import argparse
import ast
import copy
import os
import random
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_loader
from pathlib import Path


ROOT = Path(__file__).parents[1]
RECORDS = "tests/methods/test_registry.py tests/conformance/test_refusals_of_configs.py"
# Modules of ../hf_rb, the tests that mirror them, and the share that these must find.
MODULES = {
    **{f"objectives/{name}": (f"tests/objectives/test_{name}.py tests/ops/test_lm_head.py {RECORDS}", 0.95) for name in ("akl", "gopd", "hpd", "loca")},
    "objectives/profit": (f"tests/objectives/test_profit.py tests/trainers/test_sft_trainer.py {RECORDS}", 0.95),
    "objectives/skewed_kl": (f"tests/objectives/test_skewed_kl.py {RECORDS}", 0.95),
    **{f"advantages/{name}": (f"tests/advantages/test_{name}.py tests/advantages/test_shaping_pipeline.py {RECORDS}", 0.95) for name in ("calibadv", "edas", "srar", "pass_at_k")},
    "advantages/pipeline": ("tests/advantages/test_shaping_pipeline.py", 0.95),
    "ops/lm_head": ("tests/ops/test_lm_head.py", 0.95),
    "ops/backbone": ("tests/ops tests/trainers/test_own_logits.py", 0.95),
    "teachers/cached": ("tests/teachers/test_cached.py", 0.95),
    "rl/rewards": ("tests/rl/test_rewards.py", 0.85),
    "evaluation/likelihood": ("tests/evaluation", 0.85),
    "weights/engine": ("tests/weights", 0.85),
    "quantizers/loading/selection": ("tests/quantizers/test_linear_kinds.py tests/quantizers/test_readers.py tests/quantizers/test_left_experts.py", 0.85),
    "io/files": ("tests/test_files.py", 0.85),
    "io/safetensors": ("tests/test_weight_files.py tests/quantizers/test_streaming.py", 0.85),
    "utils/fields": ("tests/test_fields.py", 0.85),
}  # fmt: skip
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And, ast.FloorDiv: ast.Mult,
}  # fmt: skip


def places(tree):
    """Yields the places of a tree that can be changed: kind, line, and a function that changes the tree in place."""
    texts = {id(one.value) for one in ast.walk(tree) if isinstance(one, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            items = value if isinstance(value, list) else [value]
            for index, item in enumerate(items):

                def put(new, node=node, field=field, value=value, index=index):
                    if isinstance(value, list):
                        value[index] = new
                    else:
                        setattr(node, field, new)

                line = getattr(item, "lineno", getattr(node, "lineno", 0))
                if type(item) in SWAPS:
                    kind = (
                        "compare"
                        if isinstance(item, ast.cmpop)
                        else "bool"
                        if isinstance(item, ast.boolop)
                        else "arith"
                    )
                    yield kind, line, lambda put=put, item=item: put(SWAPS[type(item)]())
                elif isinstance(item, ast.Constant) and id(item) not in texts:
                    if isinstance(item.value, bool):
                        yield "flag", line, lambda put=put, item=item: put(ast.Constant(not item.value))
                    elif isinstance(item.value, int | float):
                        yield "number", line, lambda put=put, item=item: put(ast.Constant(item.value + 1))
                elif isinstance(item, ast.UnaryOp) and isinstance(item.op, ast.Not):
                    yield "not", line, lambda put=put, item=item: put(item.operand)
                elif isinstance(item, ast.Raise):
                    yield "raise", line, lambda put=put: put(ast.Pass())


class Changed(MetaPathFinder):
    """Gives one module its changed code, whoever imports it."""

    def __init__(self, name, code):
        self.name, self.code = name, code

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        loader = SourceFileLoader(name, str(ROOT / f"{name.replace('.', '/')}.py"))
        loader.get_code = lambda _: self.code
        return spec_from_loader(name, loader)


def survives(name, code, tests, timeout):
    """Runs the tests in a fork with the changed module; returns whether all pass."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        sys.meta_path.insert(0, Changed(name, code))
        import pytest

        os._exit(
            int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:warnings", *tests]))
        )
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40, help="mutants a module")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a mutant")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HYPOTHESIS_PROFILE": "fast"}
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for library in ("datasets", "hypothesis", "peft", "torch", "transformers", "trl"):
        __import__(library)
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    import trl.experimental.gkd  # noqa: F401

    below = []
    for module in args.modules or MODULES:
        tests, bar = MODULES[module]
        path, name = ROOT / f"hf_rb/{module}.py", f"hf_rb.{module.replace('/', '.')}"
        source = path.read_text(encoding="utf-8")
        if not survives(name, compile(source, str(path), "exec"), tests.split(), args.timeout):
            raise SystemExit(f"{module}: its tests fail without a change: {tests}")
        chosen = [*enumerate(places(ast.parse(source)))]
        chosen = random.Random(f"{args.seed} {module}").sample(chosen, min(args.count, len(chosen)))
        left = []
        for index, (kind, line, _) in chosen:
            tree = ast.parse(source)
            [*places(tree)][index][2]()
            code = compile(ast.fix_missing_locations(copy.deepcopy(tree)), str(path), "exec")
            if survives(name, code, tests.split(), args.timeout):
                left.append(f"  {line} {kind}: {source.splitlines()[line - 1].strip()}")
        share = 1 - len(left) / len(chosen)
        print(
            f"{module}: {len(chosen) - len(left)} of {len(chosen)} found ({share:.0%}, bar {bar:.0%})",
            *left,
            sep="\n",
            flush=True,
        )
        below += [module] * (share < bar)
    return bool(below)


if __name__ == "__main__":
    sys.exit(main())
