"""
Shared fixtures, the profiles of hypothesis, and the order of the tests. The environment is set before anything of the
Hugging Face stack is imported: no test may go online, and one thread a process is what models this small need.
"""

import gc
import os
import sys
from collections import defaultdict
from pathlib import Path


os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    TRL_EXPERIMENTAL_SILENCE="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings


# `make test-slow` sets `HYPOTHESIS_PROFILE=nightly`. No deadline: test machines are busy.
# The same examples in every fast run, so that a failure is of the change; new ones every night.
settings.register_profile("fast", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

TESTS = Path(__file__).parent
# Files that import no torch: they run first, so that a broken rule shows early. `make test-first` runs them alone, and
# fails when one of them has imported torch. `tests/test_habits.py` runs it, since other tests import torch before them.
TORCH_FREE = (
    "cli/test_check",
    "cli/test_library_sources",
    "cli/test_main",
    "cli/test_malformed_recipes",
    "cli/test_plan",
    "cli/test_refusals",
    "recover/test_recover_stages",
    "report/test_report",
    "test_fields",
    "test_files",
    "test_helpers",
    "test_layout",
    "test_progress",
    "test_readme",
    "test_resources",
)
# Tests of these files that import torch all the same.
NEEDS_TORCH = (
    "test_schemas_are_in_step_with_the_configs",
    "test_schemas_read_from_sources_are_those_of_the_classes",
    "test_a_dense_model_has_no_routers",
    "test_schemas_read_from_sources_are_those_of_the_classes",
    "test_the_shaper_of_the_readme",
    "test_short_examples_of_the_readme",
    "test_the_d2quant_example_of_the_readme",
    "test_the_example_prints_what_the_readme_says",
)


def is_torch_free(path: Path) -> bool:
    return path.relative_to(TESTS).as_posix().removesuffix(".py") in TORCH_FREE


def only_torch_free(config: pytest.Config) -> bool:
    """Returns whether the expression of `-m` leaves out every test that is not marked torch_free."""
    expression = config.option.markexpr
    others = (defaultdict(lambda marked=marked: marked, torch_free=False) for marked in (False, True))
    return bool(expression) and not any(eval(expression, {}, marks) for marks in others)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Does not even import the files with torch where none of their tests is selected."""
    if not only_torch_free(config) or not collection_path.is_relative_to(TESTS):
        return None
    name = collection_path.relative_to(TESTS).as_posix().removesuffix(".py")
    return True if not any(f"{one}/".startswith(f"{name}/") for one in ("./", *TORCH_FREE)) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_torch_free(item.path) and item.name.partition("[")[0] not in NEEDS_TORCH:
            item.add_marker("torch_free")
    items.sort(key=lambda item: not is_torch_free(item.path))


def pytest_collection_finish() -> None:
    """Takes the libraries out of later garbage collections, which trainers ask for at every turn."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Names the test that has imported torch."""
    imported = "torch" in sys.modules
    result = yield
    if only_torch_free(item.config) and not imported and "torch" in sys.modules:
        pytest.fail("This test imports torch: see NEEDS_TORCH in tests/conftest.py.", pytrace=False)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if only_torch_free(session.config) and "torch" in sys.modules:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(
            "\nA test that is marked torch_free, or its file, has imported torch: see TORCH_FREE in tests/conftest.py."
        )


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded tokenizer, one for each file, since trainers set fields of it."""
    from transformers import AutoTokenizer

    from hf_rb import tiny

    return AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")


@pytest.fixture
def one_thread():
    """Torch with one thread: threads that wait for others of a busy machine count as processor time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
