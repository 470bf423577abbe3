"""`hf-rb check --fix`: a recipe of another version, with the keys of this one."""

import json
from collections.abc import Collection
from typing import Any

from hf_rb.utils.renamed import RENAMED, REWRITTEN, former_key


__all__ = ["fix"]


def fix(text: str, recipe: dict[str, Any], known: Collection[str]) -> tuple[str, list[str]]:
    """
    Rewrites the keys of a recipe that this version spells otherwise. Comments and everything else stay as they are.

    Args:
        text (`str`):
            YAML of the recipe.
        recipe (`dict[str, Any]`):
            The same, read.
        known (`Collection[str]`):
            Keys that there are.

    Returns:
        `tuple[str, list[str]]`: YAML with renamed keys, where the meaning is the same, and with keys that are gone as
        comments below the reason; and one line for each change.

    Raises:
        ValueError: The recipe is written in braces.
    """
    import yaml

    node = yaml.compose(text, yaml.SafeLoader)
    if node.flow_style:
        raise ValueError("`--fix` changes lines, and this recipe is written in braces. Write one key a line.")
    lines, changes = text.splitlines(), []
    taken: set[str | None] = set(recipe)
    for key, value in reversed(node.value):  # from the end, so that the numbers of earlier lines stay right
        name, first, last = key.value, key.start_mark.line, _last_line(lines, value)
        indent = lines[first][: key.start_mark.column]
        new_name, new_value = _rewritten(name, recipe.get(name))
        if name in known and new_name is None:
            continue
        if new_name is not None and new_name not in known or new_name in taken and new_name != name:
            new_name = None
        taken.add(new_name)
        if new_name is None and (reason := former_key(name, known)) is None:
            continue
        if new_name is None:
            lines[first : last + 1] = [f"# {reason}", *(f"# {line}" for line in lines[first : last + 1])]
            changes.append(f"`{name}` is now a comment: {reason}")
        elif new_value is None:
            lines[first] = indent + new_name + lines[first][key.end_mark.column :]
            changes.append(f"`{name}` is now `{new_name}`.")
        else:
            line = f"{new_name}: {json.dumps(new_value) if isinstance(new_value, list) else new_value}"
            lines[first : last + 1] = [indent + line]
            changes.append(f"`{name}: {str(recipe[name]).lower()}` is now `{line}`.")
    return "\n".join(lines) + "\n", changes[::-1]


def _rewritten(name: str, value: Any) -> tuple[str | None, Any]:
    """Returns the new name of a key and its new value, `None` where that is the old one."""
    if isinstance(value, bool | str) and (name, value) in REWRITTEN:
        return REWRITTEN[name, value]
    return RENAMED.get(name), None


def _last_line(lines: list[str], value: Any) -> int:
    """Returns the number of the last line of a value, without the comments and blank lines below it."""
    last = value.end_mark.line - (value.end_mark.column == 0)
    while last > value.start_mark.line and (not lines[last].strip() or lines[last].lstrip().startswith("#")):
        last -= 1
    return max(last, value.start_mark.line)
