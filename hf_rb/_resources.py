"""Finds the recipes and model cards, which lie beside the package in a source tree and inside it in a wheel."""

from difflib import get_close_matches
from pathlib import Path


__all__ = ["find_recipe", "resource_folder"]


def resource_folder(name: str) -> Path:
    """Returns the folder `recipes` or `model_cards`.

    Raises:
        FileNotFoundError: The installation lacks it.
    """
    package = Path(__file__).parent
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
    folder = resource_folder("recipes")
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    if recipe.removesuffix(".yaml") in names:
        return names[recipe.removesuffix(".yaml")]
    close = get_close_matches(recipe, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the recipes of hf_rb are: {', '.join(names)}."
    raise FileNotFoundError(f"No recipe {recipe!r}: it is neither a file nor the name of a recipe of hf_rb; {hint}")
