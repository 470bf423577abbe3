"""The README's example of a shaper is run as it stands there."""

import re
from pathlib import Path

import pytest


README = Path(__file__).parents[1] / "README.md"


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
