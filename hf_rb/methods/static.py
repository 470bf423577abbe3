"""Evaluates a name of a module without importing the module: only the statements that it needs are run.

Records of methods stand in files that import torch. `hf-rb check` needs the record in a few milliseconds, so it parses
the file, keeps the statements that the record refers to, and leaves out the rest.
"""

import __future__

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


__all__ = ["evaluate", "imported_module", "is_torch_free", "parsed", "record", "record_names", "source_file"]

# Modules that are imported as they are: no torch, and classes that must be the same everywhere.
_IMPORTED = (*sys.stdlib_module_names, "hf_rb.methods", "hf_rb.utils")


def source_file(module: str) -> Path | None:
    """Returns the source of a module, importing no more than the finder of its outermost package."""
    top, *inner = module.split(".")
    spec = find_spec(top)
    if spec is not None and not inner and spec.origin and spec.origin.endswith(".py"):
        return Path(spec.origin)
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location, *inner)
        for path in (folder / "__init__.py", folder.parent / f"{folder.name}.py"):
            if path.is_file():
                return path
    return None


@cache
def evaluate(module: str, name: str) -> Any:
    """
    Returns the value of a name of a module.

    Args:
        module (`str`):
            Full name of the module.
        name (`str`):
            Name of a constant, a function or a dataclass; with a dot, `"Class.attribute"`.

    Raises:
        ImportError: There is no such module, or no such name in it.
        NameError: The value needs more than the standard library and `hf_rb.methods`.
    """
    source = _read(module)
    outer, _, attribute = name.partition(".")
    if outer not in source.defined:
        raise ImportError(f"{source.path} does not define `{outer}`")
    namespace: dict[str, Any] = {"__name__": module, "__file__": str(source.path)}
    if not attribute:
        _run(source, namespace, {outer})
        return namespace[outer]
    expression = _attribute(source.defined[outer], attribute)
    if expression is None:
        raise ImportError(f"`{outer}` of {source.path} has no attribute `{attribute}`")
    _run(source, namespace, _names(expression))
    return eval(compile(ast.Expression(expression), str(source.path), "eval"), namespace)  # noqa: S307 (an import would too)


def record_names(module: str) -> Iterator[str]:
    """Yields the names in a module that hold a record: classes with a `method`, and the constant `METHOD`."""
    for name, node in _read(module).defined.items():
        if name == "METHOD" or isinstance(_attribute(node, "method"), ast.Call):
            yield name


def record(module: str, name: str) -> Any:
    """
    Returns the record that a class of a module has as `method`, or that a constant is.

    Raises:
        TypeError: It has none.
        ImportError, NameError: As [`evaluate`].
    """
    source = _read(module)
    node = source.defined.get(name)
    if isinstance(node, ast.ImportFrom):
        return record(source.module_of(node), source.renamed[name])
    if isinstance(node, ast.ClassDef) and _attribute(node, "method") is None:
        raise TypeError(
            f"`{name}` has no record: a class attribute `method`, such as `ShaperMethod(...)` of `hf_rb.methods`"
        )
    return evaluate(module, f"{name}.method" if isinstance(node, ast.ClassDef) else name)


def is_torch_free(module: str) -> bool:
    """Says whether a module is imported as it is."""
    return any(module == one or module.startswith(f"{one}.") for one in _IMPORTED)


@cache
def parsed(path: Path) -> ast.Module:
    """Returns the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_module(node: ast.ImportFrom, package: str) -> str:
    """Returns the full name of the module that an import in a package names."""
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1] if node.level else []
    return ".".join([*base, *filter(None, [node.module])])


class _Source:
    def __init__(self, module: str, path: Path):
        self.module, self.path = module, path
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = parsed(path)
        self.body = [*_statements(tree.body)]
        self.defined = {name: node for node in self.body for name in _defines(node)}
        imports = [node for node in self.body if isinstance(node, ast.ImportFrom)]
        self.renamed = {alias.asname or alias.name: alias.name for node in imports for alias in node.names}
        has_future = any(node.module == "__future__" for node in imports)
        self.flags = __future__.annotations.compiler_flag if has_future else 0

    def module_of(self, node: ast.ImportFrom) -> str:
        """Returns the full name of the module that an import names."""
        return imported_module(node, self.package)

    def constants(self) -> Iterator[str]:
        """Yields the names that the module assigns."""
        return (name for name, node in self.defined.items() if isinstance(node, ast.Assign | ast.AnnAssign))

    def run(self, node: ast.stmt, namespace: dict[str, Any]) -> None:
        """Runs a statement, in which dataclasses find their module."""
        code = compile(ast.Module([node], []), str(self.path), "exec", self.flags, dont_inherit=True)
        stand_in = ModuleType(self.module)
        is_new = sys.modules.setdefault(self.module, stand_in) is stand_in
        try:
            exec(code, namespace)  # noqa: S102 (an import would run it too)
        finally:
            if is_new:
                del sys.modules[self.module]


@cache
def _read(module: str) -> _Source:
    path = source_file(module)
    if path is None:
        raise ImportError(f"there is no module `{module}`")
    return _Source(module, path)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields statements, and those inside `if`, `else` and `try`; none for type checkers alone."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from _statements([*(() if is_typing else node.body), *node.orelse])
        else:
            yield node


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Import):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    given = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in given for name in ast.walk(target) if isinstance(name, ast.Name)]


def _attribute(node: ast.AST, name: str) -> ast.expr | None:
    """Returns what the body of a class assigns to a name."""
    for one in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(one, ast.Assign | ast.AnnAssign) and name in _defines(one):
            return one.value
    return None


def _names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def _run(source: _Source, namespace: dict[str, Any], wanted: set[str]) -> None:
    """Runs the statements that define the wanted names, and what these refer to, in the order of the source."""
    needed, pending = set(), [*wanted]
    while pending:
        name = pending.pop()
        if name in source.defined and name not in needed:
            needed.add(name)
            node = source.defined[name]
            pending += () if isinstance(node, ast.Import | ast.ImportFrom) else _names(node)
    for node in source.body:
        names = needed & set(_defines(node))
        if isinstance(node, ast.ImportFrom):
            namespace |= _imported(source, node, names)
        elif names and (not isinstance(node, ast.Import) or all(is_torch_free(alias.name) for alias in node.names)):
            source.run(node, namespace)


def _imported(source: _Source, node: ast.ImportFrom, names: set[str]) -> dict[str, Any]:
    """Returns what `from module import names` gives. Of a module that may import torch, the names are evaluated."""
    module = source.module_of(node)
    found = {}
    for alias in node.names:
        known = alias.asname or alias.name
        if known in names and is_torch_free(module):
            found[known] = getattr(import_module(module), alias.name)
        elif known in names:
            found[known] = _evaluated(module, alias.name)
    return found


def _evaluated(module: str, name: str) -> Any:
    """Returns the value of a name of a module, or a module of that name in a package."""
    if name in _read(module).defined or source_file(f"{module}.{name}") is None:
        return evaluate(module, name)
    return SimpleNamespace(**{one: evaluate(f"{module}.{name}", one) for one in _read(f"{module}.{name}").constants()})
