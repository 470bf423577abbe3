"""Readers of the weight of a linear layer, found in the source of a model."""

import ast
import linecache
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from types import FrameType
from typing import NamedTuple, TypeGuard

from torch import nn
from transformers import GenerationMixin, PreTrainedModel


__all__ = ["is_harmless_at", "scan"]

EVERY = "*"  # any child of a module, in a path
HARMLESS = {"device", "dim", "is_cuda", "is_meta", "ndim", "requires_grad"}
# Functions that run while a model is made or changed, not when it is used.
MAKING = re.compile(r"init|resize|reset_parameters|tie_weights|prune")
LOOKING = {"getattr", "hasattr", "id", "isinstance", "len", "setattr", "super", "type"}
LISTING = {"enumerate", "iter", "list", "reversed", "tuple", "zip"}
LIBRARY = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__}


class _Read(NamedTuple):
    """
    A read of a layer's weight in the source of a class.

    Attributes:
        path (`tuple[str, ...]`): Attributes that lead to the layer.
        anchored (`bool`): Whether they start at `self`; otherwise they are the end of the layer's name.
        first (`bool`): Whether it reads the first parameter of what the path leads to, and not a `weight`.
        where (`str`): Function that reads.
    """

    path: tuple[str, ...]
    anchored: bool
    first: bool
    where: str


class _Source(NamedTuple):
    """Facts from the source of a class: reads, and readers of something that it does not name."""

    reads: list[_Read]
    unresolved: list[str]


def scan(model: nn.Module, names: dict[int, str]) -> tuple[dict[str, str], list[str]]:
    """Returns the readers of layers (name by id), and what the source does not tell."""
    found: dict[str, str] = {}
    unknown: list[str] = []
    inside = defaultdict(list)  # layers by the prefix of each module that they are in
    for name in names.values():
        parts = name.split(".")
        for depth in range(len(parts)):
            inside[".".join(parts[:depth])].append(name)
    for prefix, module in model.named_modules():
        below = inside.get(prefix)
        if not below or isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            continue
        if isinstance(module, PreTrainedModel) and (name := _first(module, names)):  # `model.dtype`
            found.setdefault(name, f"{type(module).__name__}.dtype")
        for cls in type(module).__mro__:
            if cls in LIBRARY:
                continue
            if (source := _read_class(cls)) is None:
                unknown.append(f"The source of {cls.__qualname__} cannot be read")
                continue
            unknown += [f"{where} reads the `weight` of a layer that cannot be told" for where in source.unresolved]
            for read in source.reads:
                for name in _resolve(module, prefix, read, below, names):
                    found.setdefault(name, read.where)
    return found, unknown


def _first(module: nn.Module, names: dict[int, str]) -> str | None:
    """Returns the layer that has a module's first parameter."""
    for child in module.modules():
        if any(True for _ in child.parameters(recurse=False)):
            return names.get(id(child))
    return None


def _resolve(module: nn.Module, prefix: str, read: _Read, below: list[str], names: dict[int, str]) -> Iterator[str]:
    if not read.anchored:
        end = re.compile(r"(?:^|\.)" + r"\.".join(r"[^.]+" if p == EVERY else re.escape(p) for p in read.path) + "$")
        yield from (name for name in below if end.search(name[len(prefix) :]))
        return
    reached = [module]
    for part in read.path:
        reached = [child for one in reached for child in _children(one, part)]
    for one in reached:
        if read.first:
            one = next((child for child in one.modules() if child._parameters), one)
        if id(one) in names:
            yield names[id(one)]


def _children(module: nn.Module, part: str) -> list[nn.Module]:
    if part == EVERY:
        return list(module.children())
    try:
        child = getattr(module, part, None)
    except Exception:  # a property that needs more than a model on the meta device
        return []
    return [child] if isinstance(child, nn.Module) else []


@cache
def _read_class(cls: type) -> _Source | None:
    """Returns what the source of a class says, or `None` if it cannot be read."""
    if not any(
        callable(value) or isinstance(value, (property, classmethod, staticmethod)) for value in vars(cls).values()
    ):
        return _Source([], [])
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    node = _classes(file).get(cls.__qualname__) if file else None
    if node is None:
        return None
    source = _Source([], [])
    for function in node.body:
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and not MAKING.search(function.name):
            _read_function(function, f"{cls.__qualname__}.{function.name}", source)
    return source


@cache
def _tree(file: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None


@cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    tree = _tree(file)
    found: dict[str, ast.ClassDef] = {}

    def visit(body: list, prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = node
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.If, ast.Try)):
                visit([*node.body, *node.orelse], prefix)

    visit(tree.body if tree else [], "")
    return found


def _parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _read_function(function: ast.AST, where: str, source: _Source) -> None:
    parents, parameters = _parents(function), {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
    meanings = _meanings(function)

    def add(base: ast.expr, *, handed: bool = False, first: bool = False) -> None:
        root, path = _chain(base)
        name = root.id if isinstance(root, ast.Name) else None
        if name == "self":
            if path:
                source.reads.append(_Read(path, True, first, where))
        elif name and any(part != EVERY for part in path):
            source.reads.append(_Read(path, False, first, where))
        elif name in meanings:
            for meaning in meanings[name]:  # the layer itself, or what holds it
                source.reads.append(_Read(meaning, True, first, where))
                source.reads.append(_Read((*meaning, EVERY), True, first, where))
        elif not handed and name not in parameters:  # a parameter's layer is seen where it is handed over
            source.unresolved.append(where)

    for node in ast.walk(function):
        if _reads_weight(node) and not _is_harmless(node, parents):
            base = node.value if isinstance(node, ast.Attribute) else node.args[0]
            if not (isinstance(base, ast.Name) and base.id == "self"):
                add(base)
        elif isinstance(node, ast.Call) and not _is_init(node):
            called = node.func.id if isinstance(node.func, ast.Name) else None
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            if called == "next" and (module := _parameters_of(node.args[0])) is not None:
                if not _is_harmless(node, parents):
                    add(module, handed=True, first=True)
            elif called not in LOOKING:
                for argument in arguments:
                    if isinstance(argument, (ast.Attribute, ast.Subscript, ast.Name)):
                        add(argument, handed=True)


def _reads_weight(node: ast.AST) -> TypeGuard[ast.Attribute | ast.Call]:
    if isinstance(node, ast.Attribute):
        return node.attr == "weight" and isinstance(node.ctx, ast.Load)
    return _is_getattr(node) and getattr(node.args[1], "value", None) == "weight"


def _is_getattr(node: ast.AST) -> TypeGuard[ast.Call]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    return node.func.id == "getattr" and len(node.args) > 1


def _parameters_of(node: ast.expr) -> ast.expr | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parameters":
        return node.func.value
    return None


def _is_init(node: ast.Call) -> bool:
    return "init" in ast.unparse(node.func).split(".")


def _chain(node: ast.expr) -> tuple[ast.expr, tuple[str, ...]]:
    """Returns where an expression starts, and which attributes it follows from there."""
    path: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            path.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            path.append(EVERY)
            node = node.value
        elif _is_getattr(node):
            path.append(str(getattr(node.args[1], "value", EVERY)))
            node = node.args[0]
        else:
            return node, tuple(reversed(path))


def _meanings(function: ast.AST) -> dict[str, list[tuple[str, ...]]]:
    """Returns the paths from `self` that the variables of a function may stand for."""
    meanings: dict[str, list[tuple[str, ...]]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, (ast.For, ast.comprehension)):
            targets, value = [node.target], node.iter
        elif isinstance(node, (ast.NamedExpr, ast.AnnAssign)) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if paths := list(_paths(value)):
            for name in (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)):
                meanings.setdefault(name, []).extend(paths)
    return meanings


def _paths(value: ast.expr) -> Iterator[tuple[str, ...]]:
    root, path = _chain(value)
    if path and isinstance(root, ast.Name) and root.id == "self":
        yield path
    elif isinstance(value, (ast.Tuple, ast.List)):
        parts = value.elts
        yield from (path for part in parts for path in _paths(part))
    elif isinstance(value, ast.IfExp):
        yield from (path for part in (value.body, value.orelse) for path in _paths(part))
    elif isinstance(value, ast.Call) and getattr(value.func, "id", None) in LISTING:
        yield from (path for part in value.args for path in _paths(part))


def _is_harmless(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Returns whether a read of a weight says of bytes what it says of numbers, or does not happen when the model is
    quantized.
    """
    parent, text = parents.get(node), ast.unparse(node)
    if isinstance(parent, ast.Attribute) and parent.attr in HARMLESS:
        return True
    if isinstance(parent, ast.Call) and (
        _is_init(parent) or getattr(parent.func, "id", "") in ("isinstance", "hasattr")
    ):
        return True
    if isinstance(parent, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops):
        return True
    while parent is not None:
        if isinstance(parent, (ast.If, ast.IfExp)):
            test = ast.unparse(parent.test)
            branch = parent.orelse if isinstance(parent.orelse, list) else [parent.orelse]
            if (
                "_is_quantized" in test
                and "not " not in test
                and any(node is part or _holds(part, node) for part in branch)
            ):
                return True
            if (
                f"{text}.dtype != torch.uint8" in test
                and " or " not in test
                and not any(_holds(part, node) for part in branch)
            ):
                return True
        parent = parents.get(parent)
    return False


def _holds(outer: ast.AST, inner: ast.AST) -> bool:
    return any(node is inner for node in ast.walk(outer))


def is_harmless_at(frame: FrameType) -> bool:
    """Returns whether the read that is going on in a frame is harmless."""
    file, parents = frame.f_code.co_filename, None
    line, _, column, end = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    parents = _parents_in(file)
    at = (line, column, end)
    nodes = (node for node in parents if isinstance(node, ast.Attribute) and node.attr == "weight")
    return any(
        (node.lineno, node.col_offset, node.end_col_offset) == at and _is_harmless(node, parents) for node in nodes
    )


@cache
def _parents_in(file: str) -> dict[ast.AST, ast.AST]:
    tree = _tree(file)
    return _parents(tree) if tree else {}
