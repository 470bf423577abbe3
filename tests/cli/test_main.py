import resource
import subprocess
import sys
from types import ModuleType

import pytest

from hf_rb import __version__
from hf_rb.cli import VERBS, main


@pytest.fixture
def verb(monkeypatch):
    """A verb `fail` whose `run` a test sets."""
    module = ModuleType("tests.fail")
    module.EXAMPLE = "hf-rb {verb} --size 3"
    module.configure = lambda parser: parser.add_argument("--size", type=int)
    monkeypatch.setitem(sys.modules, "tests.fail", module)
    monkeypatch.setitem(VERBS, "fail", ("tests.fail", "Fails."))
    return module


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_every_verb(arguments, capsys):
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert all(verb in output and help in output for verb, (_, help) in VERBS.items())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert main([verb, "--help"]) == 0
    output = capsys.readouterr().out
    assert f"usage: hf-rb {verb} " in output
    assert f"example:\n  hf-rb {verb} " in output
    assert "--debug" in output


@pytest.mark.parametrize(
    ("verb", "keys"),
    [
        ("sft", ["profit_threshold", "graft_onto"]),
        ("gkd", ["objective", "loca_alpha"]),
        ("distillation", ["objective", "gopd_tis_cap"]),
        ("grpo", ["advantage_shapers", "hidden_align_coef"]),
        ("recover", ["examples", "model_name_or_path"]),
    ],
)
def test_verbs_of_recipes_list_the_keys_that_are_ours(verb, keys, capsys):
    assert main([verb, "--help"]) == 0
    listed = capsys.readouterr().out.partition("or as `--key value`:")[2]
    assert all(f"\n  {key} " in listed for key in keys) and "\n  learning_rate " not in listed


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf_rb {__version__}\n"


@pytest.mark.parametrize(
    ("given", "message"), [("chekc", "did you mean 'check'?"), ("zzz", "the verbs are demo, check, sft")]
)
def test_a_misspelt_verb_is_bad_input(given, message, capsys):
    assert main([given, "--json"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sise", "3"], "unknown argument '--sise'; did you mean '--size'?"),
        (["--size", "x"], "invalid int value: 'x'"),
    ],
)
def test_a_bad_argument_is_bad_input(verb, arguments, message, capsys):
    assert main(["fail", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError])
def test_bad_input_is_one_message(verb, error, capsys):
    def run(args):
        raise error("write it another way")

    verb.run = run
    assert main(["fail"]) == 2
    assert capsys.readouterr().err == "hf-rb fail: error: write it another way\n"
    assert main(["fail", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_one_line(verb, capsys):
    def run(args):
        raise KeyboardInterrupt

    verb.run = run
    assert main(["fail"]) == 130
    assert capsys.readouterr().err == "hf-rb fail: interrupted\n"


def test_another_error_is_not_hidden(verb):
    def run(args):
        raise RuntimeError("a defect of ours")

    verb.run = run
    with pytest.raises(RuntimeError, match="a defect of ours"):
        main(["fail"])


def test_the_verb_gets_its_arguments_and_gives_the_exit_code(verb):
    seen = []
    verb.run = lambda args: seen.append((args.size, args.verb, args.debug)) or 1
    assert main(["fail", "--size", "3"]) == 1
    assert seen == [(3, "fail", False)]


def test_from_the_shell_help_is_fast_and_exit_codes_are_the_same():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "hf_rb.cli", "--help"], check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, because other processes may share the cores.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    command = [sys.executable, "-m", "hf_rb.cli", "chekc"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 2
