"""Find the parts of a LightningModule that its `forward` uses, by reading the code without running it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

# Code that uses one of these attributes may use any submodule or parameter.
_ANY_PART = frozenset(
    {"children", "named_children", "modules", "named_modules", "parameters", "named_parameters", "get_submodule"}
    | {"get_parameter", "_modules", "_parameters", "apply", "state_dict", "__dict__", "_forward_module"}
)


class _UnclearError(Exception):
    """The code may use submodules that it does not name."""


def reached_by_forward(module: LightningModule) -> set[str] | None:
    """Return the paths of the submodules and parameters that the code of `forward` names.

    Methods and properties that it uses on `self` are read as well. A path is as long as the code spells it: for
    `self.model.encoder`, only the encoder counts.

    Returns:
        The paths; None where reading the code is not enough: the class has no `forward` of its own or no source, the
        code passes `self` to other code, or it finds submodules by `getattr` or in a loop over all of them.
    """
    # Lightning may leave a bound copy there.
    own = getattr(vars(module).get("forward"), "__func__", vars(module).get("forward"))
    if not is_overridden("forward", module) or own not in (None, type(module).forward):
        return None
    if type(module).__getattr__ is not nn.Module.__getattr__:
        return None
    found: set[str] = set()
    todo, seen = ["forward"], {"forward"}
    try:
        while todo:
            for tree, me in _definitions(type(module), todo.pop()):
                for chain in _chains(tree, me):
                    path, method = _resolve(module, chain)
                    if path:
                        found.add(path)
                    elif method and method not in seen:
                        seen.add(method)
                        todo.append(method)
    except _UnclearError:
        return None
    return found or None


def is_within(path: str, parts: set[str]) -> bool:
    """Whether a dotted path is one of the parts, or lies within one."""
    return any(f"{path}.".startswith(f"{part}.") for part in parts)


def _definitions(kind: type, name: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield the code of a method and its name for `self`; if it uses `super()`, also those of overridden methods."""
    for base in kind.__mro__:
        function: Any = vars(base).get(name)
        if function is None or _is_of_a_library(base):
            continue
        function = function.fget if isinstance(function, property) else getattr(function, "__func__", function)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, SyntaxError) as error:
            raise _UnclearError from error
        definition = tree.body[0]
        if not isinstance(definition, ast.FunctionDef):  # a lambda, or a method whose source is something else
            raise _UnclearError
        arguments = [*definition.args.posonlyargs, *definition.args.args]
        if not arguments:
            return  # a static method sees no `self`
        yield definition, arguments[0].arg
        if not any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(definition)):
            return


def _chains(tree: ast.AST, me: str) -> Iterator[list[str]]:
    """Yield every chain of attribute names that starts at `self`, such as ["model", "encoder"]."""
    chain = _chain(tree, me)
    if chain:
        yield chain
        return
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "super":
        return
    if isinstance(tree, ast.Name) and tree.id == me:
        raise _UnclearError
    for child in ast.iter_child_nodes(tree):
        yield from _chains(child, me)


def _chain(node: ast.AST, me: str) -> list[str] | None:
    if isinstance(node, ast.Name):
        return [] if node.id == me else None
    if isinstance(node, ast.Attribute):
        before = _chain(node.value, me)
        return None if before is None else [*before, node.attr]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        before = _chain(node.value, me)
        return [*before, str(node.slice.value)] if before else None
    return None


def _resolve(module: LightningModule, chain: list[str]) -> tuple[str, str]:
    """Return the path that a chain leads to, or the name of the method or property that it calls."""
    path: list[str] = []
    part: nn.Module = module
    for name in chain:
        if name not in part._modules:
            break
        path.append(name)
        inside = part._modules[name]
        if inside is None:
            break
        part = inside
    first = chain[0]
    if path:
        return ".".join(path), ""
    if first in _ANY_PART:
        raise _UnclearError
    if first in module._parameters:
        return first, ""
    if first in vars(module):
        if _holds_modules(vars(module)[first]):
            raise _UnclearError
        return "", ""
    mine = next((base for base in type(module).__mro__ if first in vars(base)), LightningModule)
    own = getattr(mine, first, None)
    code = callable(own) or isinstance(own, property)
    return "", first if code and not _is_of_a_library(mine) else ""


def _is_of_a_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "lightning", "lightning_fabric", "builtins")


def _holds_modules(value: Any, depth: int = 2) -> bool:
    """Whether a plain attribute, such as a list or a function with a closure, holds modules, directly or deeper."""
    if isinstance(value, nn.Module):
        return True
    if depth == 0 or isinstance(value, str | bytes | int | float | type(None) | type):
        return False
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    else:
        cells = getattr(value, "__closure__", None) or ()
        inside = [getattr(value, "__self__", None), getattr(value, "func", None)]
        inside += [one.cell_contents for one in cells if _filled(one)]
        inside += list(getattr(value, "__dict__", {}).values())
    return any(_holds_modules(one, depth - 1) for one in inside)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
