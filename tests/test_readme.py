"""Examples of the README and the cards: the shaper is run as it stands there, every command line is one that its verb takes."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from hf_rb import cli
from hf_rb.cli import schemas
from hf_rb.cli.check import check, read_overrides, read_recipe
from hf_rb.io.resources import find_recipe


README = Path(__file__).parents[1] / "README.md"
CARDS = sorted((README.parent / "model_cards").glob("*.md"))


def test_the_shaper_of_the_readme(tmp_path, monkeypatch):
    (block,) = (
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "Shaper)" in code
    )
    assert len(block.partition("class ")[2].partition("\n\n\n")[0].splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    logged = names["trainer"].state.log_history[-1]
    assert logged["shaping/brevity/changed"] > 0
    assert logged["shaping/brevity/flipped"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("start", "shortened"),
    [
        ("from hf_rb import SFTConfig", {"max_steps=20": "max_steps=1", "size=2000": "size=20"}),
        ("from hf_rb import GKDConfig, GKDTrainer, tiny", {"max_steps=20": "max_steps=1", "size=2000": "size=20"}),
        (
            "from transformers import AutoModelForCausalLM\nfrom hf_rb import MPI",
            {"layers=4": "layers=1, vocab_size=99"},
        ),
    ],
    ids=["ProFit", "AKL", "MPI"],
)
def test_short_examples_of_the_readme(start, shortened, tmp_path, monkeypatch):
    (code,) = re.findall(rf"```python\n({re.escape(start)}.*?)```", README.read_text(), re.DOTALL)
    for long, short in shortened.items():
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    exec(code, {})


# Standard deviations of the example's figures over 20 calibration seeds, relative to the mean and of the worst layer. Another
# processor rounds otherwise, which turns codes that lie near a tie: at most it is another draw of the calibration.
SPREAD = {"error": 0.012, "mean square": 0.047}


def test_the_d2quant_example_of_the_readme(tmp_path, monkeypatch, capsys):
    code, output = re.search(
        r"```python\n(import hf_rb\nfrom hf_rb import tiny.*?)```\n\n```text\n(.*?)```", README.read_text(), re.DOTALL
    ).groups()
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    numbers = re.compile(r"0\.\d+")
    printed = capsys.readouterr().out
    assert numbers.sub("_", printed) == numbers.sub("_", output) and len(code.splitlines()) <= 20
    for line, expected in zip(printed.splitlines()[:-1], output.splitlines(), strict=False):
        (error, before, after), told = (list(map(float, numbers.findall(text))) for text in (line, expected))
        assert after < before
        for figure, wanted, kind in zip(
            (error, before, after), told, ("error", "mean square", "mean square"), strict=True
        ):
            # Four deviations of the difference of two draws.
            assert figure == pytest.approx(wanted, rel=4 * 2**0.5 * SPREAD[kind])


@pytest.mark.slow
def test_the_example_prints_what_the_readme_says(tmp_path, monkeypatch, capsys):
    code, printed = re.search(
        r"## Twenty lines\n\n```python\n(.*?)```\n\n```\n(.*?)```", README.read_text(), re.DOTALL
    ).groups()
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    said = capsys.readouterr().out.splitlines()[-3:]
    for line, expected in zip(said, printed.splitlines(), strict=True):
        found = re.fullmatch(r"(\S+) +16 bits (\d+)%   PTQTP (\d+)%", line).groups()
        wanted = re.fullmatch(r"(\S+) +16 bits (\d+)%   PTQTP (\d+)%", expected).groups()
        # Another processor rounds otherwise; an answer in twenty may turn.
        assert found[0] == wanted[0] and all(
            abs(int(a) - int(b)) <= 5 for a, b in zip(found[1:], wanted[1:], strict=True)
        )


def commands(page):
    """The command lines of `hf-rb` in a page's blocks of shell code."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                if command.startswith("hf-rb "):
                    yield shlex.split(command, comments=True)[1:]


COMMANDS = [(page.name, command) for page in [README, *CARDS] for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page} {shlex.join(line)}" for page, line in COMMANDS])
def test_command_lines_are_accepted(page, command):
    verb, *rest = command
    module = import_module(cli.VERBS[verb][0])
    args = cli.parse(verb, module, rest)
    recipe = getattr(args, "recipe", None) or getattr(args, "config", None)
    if recipe not in (None, "recipe.yaml"):  # the latter is the reader's
        values = read_recipe(find_recipe(recipe))
        if module.__name__ == "hf_rb.cli.train":
            values |= read_overrides(args.overrides, verb)
        assert check(find_recipe(recipe), values, verb if verb in schemas.RECIPES else None).errors == []


def test_every_verb_is_in_the_readme():
    text = README.read_text()
    assert [verb for verb in cli.VERBS if f"hf-rb {verb}" not in text] == []
