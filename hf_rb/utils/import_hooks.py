"""Hooks that run when a library's module has been imported, or at once if it has been already.

An error inside a hook would break the library's import, so it is kept, and [`require`] raises it when a feature that
needs the hook is used.
"""

from collections.abc import Callable
from types import ModuleType

from wrapt import when_imported


__all__ = ["on_import", "require"]

_errors: dict[str, Exception] = {}


def on_import(name: str, hook: Callable[[ModuleType], None]) -> None:
    """Runs a hook on a module when it has been imported; a hook must not import anything that is still half
    imported.
    """

    def run(module: ModuleType) -> None:
        try:
            hook(module)
        except Exception as error:
            _errors[name] = error

    when_imported(name)(run)


def require(library: str) -> None:
    """Raises the error that kept us from registering with a library (`transformers`, `peft`), if there was one.

    Raises:
        ImportError: The hook failed, as it does when the library has moved a name that we rely on.
    """
    for module, error in _errors.items():
        if module.partition(".")[0] == library:
            raise ImportError(f"hf_rb could not register with {module}: {error}") from error
