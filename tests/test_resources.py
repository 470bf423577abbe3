from pathlib import Path

import pytest

from hf_rb.io import resources
from hf_rb.io.resources import find_recipe, recipe_names, resource_folder


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A package as a wheel installs it, beside somebody else's folder of the same name."""
    package = tmp_path / "site-packages" / "hf_rb"
    (package / "_recipes" / "profit").mkdir(parents=True)
    (package / "_recipes" / "profit" / "tiny-cpu.yaml").write_text("output_dir: out\n")
    (package.parent / "recipes").mkdir()
    monkeypatch.setattr(resources, "__file__", str(package / "io" / "resources.py"))
    return package


@pytest.mark.parametrize("name", ["recipes", "model_cards"])
def test_found_in_a_source_tree(name):
    assert resource_folder(name) == Path(__file__).resolve().parents[1] / name


def test_found_in_a_wheel(installed):
    assert resource_folder("recipes") == installed / "_recipes"
    with pytest.raises(FileNotFoundError, match="no 'model_cards' folder"):
        resource_folder("model_cards")


@pytest.mark.parametrize("name", ["profit/tiny-cpu", "profit/tiny-cpu.yaml"])
def test_a_recipe_by_name(installed, name):
    assert find_recipe(name) == installed / "_recipes" / "profit" / "tiny-cpu.yaml"


def test_a_file_goes_before_a_name(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("profit/tiny-cpu.yaml")
    file.parent.mkdir()
    file.touch()
    assert find_recipe(str(file)) == file


def test_a_misspelt_recipe_gets_a_suggestion(installed):
    with pytest.raises(FileNotFoundError, match="'profit/tiny-cpus'.*did you mean 'profit/tiny-cpu'"):
        find_recipe("profit/tiny-cpus")
    with pytest.raises(FileNotFoundError, match="did you mean 'profit/tiny-cpu'"):
        find_recipe("profit")
    with pytest.raises(FileNotFoundError, match="name of a recipe of hf_rb, which are: profit/tiny-cpu.$"):
        find_recipe("zzz")
    with pytest.raises(FileNotFoundError, match="No recipe 'zzz.yaml': there is no such file.$"):
        find_recipe("zzz.yaml")


def test_how_to_launch_is_no_recipe():
    assert not any("accelerate" in name for name in recipe_names())
    with pytest.raises(FileNotFoundError, match="RECIPE --accelerate_config ddp`"):
        find_recipe("accelerate_configs/ddp")
