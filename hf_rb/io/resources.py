"""Finds the recipes and model cards, which lie beside the package in a source tree and inside it in a wheel."""

from difflib import get_close_matches
from pathlib import Path


__all__ = ["find_recipe", "recipe_names", "resource_folder"]


def resource_folder(name: str) -> Path:
    """Returns the folder `recipes` or `model_cards`.

    Raises:
        FileNotFoundError: The installation lacks it.
    """
    package = Path(__file__).parents[1]
    # The wheel's place first: beside an installed package, a folder of that name is somebody else's.
    for folder in (package / f"_{name}", package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"This installation of hf_rb has no {name!r} folder; reinstall hf_rb.")


def find_recipe(recipe: str) -> Path:
    """Returns the path of a recipe given as a path, or by the name of one that ships with hf_rb (`profit/tiny-cpu`).

    Raises:
        FileNotFoundError: Neither a file nor the name of a recipe of ours.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    names, name = recipe_names(), recipe.removesuffix(".yaml")
    if name in names:
        return names[name]
    close = [one for one in names if one.startswith(f"{name}/")] or get_close_matches(name, names, n=1)
    if name.startswith("accelerate_configs/"):
        hint = f"it says how to launch, beside a recipe: `hf-rb sft RECIPE --accelerate_config {Path(name).name}`."
    elif close:
        hint = f"it is neither a file nor the name of a recipe of hf_rb; did you mean {' or '.join(map(repr, close))}?"
    elif name != recipe:
        hint = "there is no such file."
    else:
        hint = f"it is neither a file nor the name of a recipe of hf_rb, which are: {', '.join(names)}."
    raise FileNotFoundError(f"No recipe {recipe!r}: {hint}")


def recipe_names() -> dict[str, Path]:
    """Returns the recipes that ship with hf_rb: name (`profit/tiny-cpu`) to path."""
    folder = resource_folder("recipes")
    paths = (path for path in sorted(folder.rglob("*.yaml")) if path.parent.name != "accelerate_configs")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
