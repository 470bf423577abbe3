"""Public names of a package that load on first use. Standard library only."""

import ast
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


__all__ = ["lazy_names"]


def lazy_names(package: str, packages: Sequence[str] = ()) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Returns the `__getattr__` and `__dir__` of a package whose `__init__.py` imports its names under
    `if TYPE_CHECKING:`.

    Those imports are the table of where each name is: they are read from the source, as editors and type checkers read
    them, and done when a name is first used.

    Args:
        package (`str`):
            The package, `__name__` in its `__init__.py`.
        packages (`Sequence[str]`, *optional*):
            Packages below it that are attributes without an import of their own.

    Raises:
        ImportError: The package is installed without its sources.

    Example:

    ```python
    if TYPE_CHECKING:
        from hf_rb.recover.config import RecoverConfig

    __all__ = ["RecoverConfig"]

    __getattr__, __dir__ = lazy_names(__name__)
    ```
    """
    module = sys.modules[package]
    places = _imports(module)

    def get(name: str) -> Any:
        if name in packages:
            return import_module(f"{package}.{name}")
        if name not in places:
            # With the name and the module, Python's traceback adds "Did you mean".
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)
        value = getattr(import_module(places[name]), name)
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(module), *places, *packages})

    return get, names


def _imports(module: ModuleType) -> dict[str, str]:
    """Returns the module of each name that a module's source imports under `if TYPE_CHECKING:`."""
    # Of its loader, since the file may be in a zip archive.
    read = getattr(module.__spec__ and module.__spec__.loader, "get_source", None)
    source = read(module.__name__) if read else None
    if source is None:
        raise ImportError(
            f"{module.__name__} reads its public names from its source, and is installed as bytecode alone: install "
            "hf_rb with its .py files.",
            name=module.__name__,
        )
    tree = ast.parse(source)
    blocks = [one for one in tree.body if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"]
    imports = [one for block in blocks for one in block.body if isinstance(one, ast.ImportFrom)]
    return {alias.name: str(one.module) for one in imports for alias in one.names}
