"""Reads the fields of config classes from their sources, without importing a library.

`class_fields("trl:SFTConfig")` finds the class as an import of that name does: it follows the imports of the sources,
also those for type checkers alone, and then the base classes. A base class of the standard library, or one without a
source, has no fields. Values are read where the source states them: constants, members of enumerations, names of
constants. Any other default reads as `None`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from hf_rb.cli.schemas.entry import TYPE_NAMES, make_entry
from hf_rb.methods.static import imported_module, parsed, source_file


__all__ = ["Missing", "class_fields"]


# A class that TRL may drop without notice, and ours that then stands in for it, by the name that is either.
STAND_INS = {"GKDBaseConfig": ("trl.experimental.gkd:GKDConfig", "hf_rb.trainers.gkd.base_config:GKDArguments")}


class Missing(ValueError):
    """A class that the installed version of a library does not have."""


class _Module:
    """The source of one module: its classes, constants and imports by name."""

    def __init__(self, name: str, path: Path):
        self.name = name
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.names: dict[str, ast.ClassDef | ast.Import | ast.ImportFrom | ast.Assign] = {}
        self.renamed: dict[str, str] = {}
        for node in _statements(parsed(path).body):
            if isinstance(node, ast.ClassDef):
                if not isinstance(self.names.get(node.name), ast.Assign):
                    self.names[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.names.setdefault(node.targets[0].id, node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    # `import a.b` gives the name `a` to the package.
                    given = alias.name if alias.asname or isinstance(node, ast.ImportFrom) else _top(alias.name)
                    known = alias.asname or given
                    self.names.setdefault(known, node)
                    self.renamed.setdefault(known, given)

    def source_of(self, node: ast.ImportFrom) -> str:
        """Returns the full name of the module that an import names."""
        return imported_module(node, self.package)

    def module_of(self, node: ast.expr) -> str:
        """Returns the full name of the module that an expression such as `library.part` stands for here."""
        first, dot, rest = ast.unparse(node).partition(".")
        bound = self.names.get(first)
        if isinstance(bound, ast.Import):
            first = self.renamed[first]
        elif isinstance(bound, ast.ImportFrom):
            first = f"{self.source_of(bound)}.{self.renamed[first]}"
        return f"{first}{dot}{rest}"


class _Class(NamedTuple):
    module: _Module
    node: ast.ClassDef


def class_fields(source: str) -> dict[str, dict[str, Any]]:
    """
    Returns the fields of a dataclass and of its bases, as entries of a schema.

    Args:
        source (`str`):
            Module and class, such as `"trl:SFTConfig"`.

    Raises:
        Missing: The library is not installed, or has no such class.
    """
    module, _, name = source.partition(":")
    found = _find(module, name)
    if not isinstance(found, _Class):
        raise _missing(module, name)
    return dict(_fields(found))


def _missing(module: str, name: str) -> Missing:
    return Missing(f"{_installed(module)} has no class `{module}.{name}`.{_remedy(module)}")


@cache
def _fields(found: _Class) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for node in reversed(found.node.bases):
        base = _class(found.module, node)
        if base is None and found.module.name.startswith("hf_rb.") and isinstance(node, ast.Attribute):
            raise _missing(found.module.module_of(node.value), node.attr)
        if base is not None and base != found:
            entries |= _fields(base)
    if any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list):
        for node in found.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                entries |= _field(node.target.id, node, found)
    return entries


def _top(module: str) -> str:
    return module.partition(".")[0]


def _installed(module: str) -> str:
    library = _top(module)
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return f"{library}, which is not installed,"


def _remedy(module: str) -> str:
    """Returns the versions that this package works with, if the library is among its dependencies."""
    library = re.compile(rf"{_top(module)}\b[^;]*")
    try:
        wanted = [found.group() for line in metadata.requires("hf_rb") or () if (found := library.match(line))]
    except metadata.PackageNotFoundError:
        wanted = []
    return f" hf_rb works with {wanted[0].strip()}, which comes with `pip install hf_rb`." if wanted else ""


def _field(name: str, node: ast.AnnAssign, owner: _Class) -> dict[str, dict[str, Any]]:
    """Returns the entry of a field by its name; nothing for a variable of the class, and for a field that no call can
    set.
    """
    if "ClassVar" in ast.unparse(node.annotation):
        return {}
    given: dict[str, ast.expr] = {}
    about: dict[str, Any] = {}
    function = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
    is_flag = function.rpartition(".")[2] == "flag"  # ours
    if isinstance(node.value, ast.Call) and is_flag:
        named = {str(keyword.arg): keyword.value for keyword in node.value.keywords}
        named |= dict(zip(("default", "help"), node.value.args, strict=False))
        given["default"] = named.pop("default")
        about = {name: _value(value, owner) for name, value in named.items()}
    elif isinstance(node.value, ast.Call) and function.endswith("field"):
        given = {str(keyword.arg): keyword.value for keyword in node.value.keywords}
    elif node.value is not None:
        given = {"default": node.value}
    if "init" in given and _value(given["init"], owner) is False:
        return {}
    about = about or _parts(given.get("metadata"), owner)
    is_own = is_flag or ast.unparse(given.get("metadata", ast.Constant(None))).startswith("described(")
    default = {}
    if "default_factory" in given:
        default = {"default": _made(given["default_factory"], owner)}
    elif "default" in given:
        default = {"default": _value(given["default"], owner)}
    options = list(_options(node.annotation))
    return {
        name: make_entry(
            name,
            {_type_name(option, owner) for option in options},
            choices=about.get("choices") or _choices(options, owner),
            range=about.get("range"),
            help=about.get("help") or "",
            keys=_nested(options, owner),
            own=is_own,
            **default,
        )
    }


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields statements and those inside `if`, `else` and `try`; those for type checkers come last."""
    for node in body:
        yield node
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        parts = ("orelse", "body") if is_typing else ("body", "orelse")
        for part in parts if isinstance(node, ast.If | ast.Try) else ():
            yield from _statements(getattr(node, part))


@cache
def _module(name: str) -> _Module | None:
    path = None if _top(name) in sys.stdlib_module_names else source_file(name)
    return None if path is None else _Module(name, path)


def _find(module: str, name: str) -> "_Class | tuple[_Module, ast.Assign] | None":
    """Finds a class, or a constant with its module, by the name that a module has for it."""
    seen: set[tuple[str, str]] = set()
    while (source := _module(module)) and (module, name) not in seen:
        seen.add((module, name))
        node = source.names.get(name)
        if isinstance(node, ast.ClassDef):
            return _Class(source, node)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in source.names:
            name = node.value.id  # another name for it
            continue
        if isinstance(node, ast.Assign):
            return source, node
        if not isinstance(node, ast.ImportFrom):
            return None
        module, name = source.source_of(node), source.renamed[name]
    return None


def _class(module: _Module, node: ast.expr) -> _Class | None:
    """Finds the class that an expression stands for in a module: `Base`, `library.Base`, or one of them with types in
    brackets.
    """
    node = node.value if isinstance(node, ast.Subscript) else node
    found = None
    if isinstance(node, ast.Name):
        places = [*(one.split(":") for one in STAND_INS.get(node.id, ())), (module.name, node.id)]
        found = next((one for place in places if isinstance(one := _find(*place), _Class)), None)
    elif isinstance(node, ast.Attribute):
        found = _find(module.module_of(node.value), node.attr)
    return found if isinstance(found, _Class) else None


def _value(node: ast.AST, owner: _Class) -> Any:
    """Returns the value of an expression in the body of a class, and `None` where its source does not state it."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Name):
        stated = [
            one for one in _statements(owner.node.body) if isinstance(one, ast.Assign) and _assigns(one, node.id)
        ]
        if stated:  # the last: the first is for older versions of a library
            return _value(stated[-1].value, owner)
        found = _find(owner.module.name, node.id)
        if found is None or isinstance(found, _Class):
            return None
        return _value(found[1].value, owner._replace(module=found[0]))
    if isinstance(node, ast.List | ast.Tuple):
        values = []
        for one in node.elts:
            values += _value(one.value, owner) or () if isinstance(one, ast.Starred) else [_value(one, owner)]
        return values
    if isinstance(node, ast.Attribute):
        return _members(node.value, owner).get(node.attr)
    return None


def _made(factory: ast.AST, owner: _Class) -> Any:
    """Returns what a default factory makes."""
    if isinstance(factory, ast.Lambda):
        return _value(factory.body, owner)
    empty = {"list": [], "dict": {}}
    return empty.get(factory.id) if isinstance(factory, ast.Name) else None


def _parts(node: ast.AST | None, owner: _Class) -> dict[str, Any]:
    """Returns the values of a dictionary with constant keys, or of a call of our own `described`."""
    if isinstance(node, ast.Call):
        given = {str(keyword.arg): _value(keyword.value, owner) for keyword in node.keywords}
        return {"help": _value(node.args[0], owner), **given} if node.args else given
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values, strict=True)
    return {str(key.value): _value(value, owner) for key, value in pairs if isinstance(key, ast.Constant)}


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _options(annotation: ast.expr) -> Iterator[ast.expr]:
    """Yields the alternatives of a union, or the type alone."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from _options(ast.parse(annotation.value, mode="eval").body)
    elif isinstance(annotation, ast.BinOp):
        yield from _options(annotation.left)
        yield from _options(annotation.right)
    elif _outer(annotation) == "Union":
        for part in _arguments(annotation):
            yield from _options(part)
    elif _outer(annotation) == "Optional":
        for part in _arguments(annotation):
            yield from _options(part)
        yield ast.Constant(None)
    else:
        yield annotation


def _outer(option: ast.expr) -> str:
    """Returns the name of a type without its arguments and its module."""
    return ast.unparse(option.value if isinstance(option, ast.Subscript) else option).rpartition(".")[2]


def _arguments(option: ast.expr) -> list[ast.expr]:
    inner = option.slice if isinstance(option, ast.Subscript) else None
    return list(inner.elts) if isinstance(inner, ast.Tuple) else [inner] if inner is not None else []


def _type_name(option: ast.expr, owner: _Class) -> str:
    outer, arguments = _outer(option), _arguments(option)
    if outer in ("list", "List"):
        return f"list[{_type_name(arguments[0], owner)}]" if arguments else "list[any]"
    if outer == "Literal":
        return TYPE_NAMES[type(ast.literal_eval(arguments[0]))]
    for kind, name in TYPE_NAMES.items():
        if outer in (kind.__name__, "None" if kind is type(None) else kind.__name__.title()):
            return name
    found = _class(owner.module, option)
    if found is None:
        return "any"
    return "str" if _is_enumeration(found.node) else "dict" if found.node.decorator_list else "any"


def _is_enumeration(node: ast.ClassDef) -> bool:
    return any(_outer(base).endswith("Enum") for base in node.bases)


def _members(node: ast.expr, owner: _Class) -> dict[str, Any]:
    """Returns the members of an enumeration, and nothing for another class."""
    found = _class(owner.module, node)
    if found is None or not _is_enumeration(found.node):
        return {}
    assigned = [node for node in found.node.body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): _value(node.value, found) for node in assigned}


def _choices(options: list[ast.expr], owner: _Class) -> list[Any]:
    """Returns the values of a `Literal` or of an enumeration, which the config converts a string to."""
    for option in options:
        if _outer(option) == "Literal" and not any(_outer(other) == "str" for other in options):
            return [ast.literal_eval(value) for value in _arguments(option)]
        if members := _members(option, owner):
            return list(members.values())
    return []


def _nested(options: list[ast.expr], owner: _Class) -> dict[str, Any] | None:
    """Returns the fields of the dataclass that a list holds."""
    for option in options:
        if _outer(option) == "list" and _arguments(option) and _type_name(_arguments(option)[0], owner) == "dict":
            if found := _class(owner.module, _arguments(option)[0]):
                return _fields(found)
    return None
