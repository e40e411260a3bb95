"""Modules that become modules of another class, in place, and can become what they were again.

The code around a module, its hooks and its parents' lists all hold the module itself. So a module that another one
should take the place of keeps its identity: its class changes, and with it its tensors and children.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_SHAPES: Any = WeakTensorKeyDictionary()  # by tensor that has left: itself without values, the same for all its owners
_MEMORY: Any = WeakTensorKeyDictionary()  # by tensor without values: a weak reference to what has become of it


@dataclass
class Dense:
    """What a module was before its class changed, with which it can become what it was.

    Attributes:
        kind: Its class.
        entries: Its tables of tensors and children, and its attributes that held tensors or modules. Parameters and
            saved buffers have no values: they are on the meta device.
        added: The names of the attributes that came with the new class.
    """

    kind: type[nn.Module]
    entries: dict[str, Any]
    added: tuple[str, ...]


class Changed(nn.Module):
    """A module whose class has changed. It shows the tensors that it had by their names, without values."""

    _dense: Dense
    _like: Tensor  # follows the module's dtype and device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._like = fn(self._like)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for table in TABLES[:3]:
            if name in own.get(table, ()):
                return own[table][name]
        # Code may look at the type or the shape of weights, as torch's transformer layers do before they run.
        dense = own.get("_dense")
        for table in (*(dense.entries[one] for one in TABLES[:3]), dense.entries) if dense is not None else ():
            if name in table:
                return table[name]
        return super().__getattr__(name)


def change_class(
    module: nn.Module, kind: type[Changed], added: Mapping[str, Any], *, without: tuple[str, ...] = ()
) -> Callable[[], None]:
    """Make a module one of another class, in place, without tensors and children, and return a function to undo it.

    The module keeps its identity, its mode, its hooks, and its attributes that are neither tensors nor modules.

    Args:
        module: The module.
        kind: Its new class.
        added: The attributes that come with it.
        without: Names of attributes that go, in addition.
    """
    own, before = vars(module), type(module)
    like = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0)).detach()
    held = {
        name: value
        for name, value in own.items()
        if name in TABLES or name in without or (not name.endswith("_hooks") and _holds_tensors(value))
    }
    itself = nn.Module()
    vars(itself).update({name: held[name] for name in TABLES})
    empty = {name: vars(_without_values(itself, {}))[name] for name in TABLES}
    names = (*added, "_dense", "_like")
    shadowed = {name: own[name] for name in names if name in own and name not in held}
    for name in (*held, *shadowed):
        del own[name]
    own |= {"_parameters": {}, "_buffers": {}, "_modules": {}, "_non_persistent_buffers_set": set()}
    own |= dict(added)
    own["_dense"] = Dense(before, held | shadowed | empty, names)
    own["_like"] = torch.empty(0, dtype=like.dtype, device=like.device)
    module.__class__ = kind

    def undo() -> None:
        now = own["_like"]
        for name in names:
            own.pop(name, None)
        own.update(held | shadowed)
        module.__class__ = before
        if (now.dtype, now.device) != (like.dtype, like.device):  # the network was converted or moved meanwhile
            module.to(now.device, now.dtype)

    return undo


def absent_parameters(module: Changed) -> dict[str, nn.Parameter]:
    """Return the parameters, without values, that a module shows by the names that they had before its class changed.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = change_class(layer, Changed, {})
        >>> list(absent_parameters(layer)), layer.weight.is_meta
        (['weight', 'bias'], True)
    """
    return {name: one for name, one in module._dense.entries["_parameters"].items() if one is not None}


def become_dense(module: Changed) -> None:
    """Make a module what it was before its class changed, with undefined values of parameters and saved buffers."""
    dense, like, own = module._dense, module._like, vars(module)
    mode = module.training
    for name in (*dense.added, *TABLES):
        own.pop(name, None)
    own.update(dense.entries)
    module.__class__ = dense.kind  # type: ignore[assignment]
    for one in module.modules():
        for table in (one._parameters, one._buffers):
            for name, tensor in list(table.items()):
                if tensor is not None and tensor.is_meta:
                    table[name] = _with_memory(tensor, like)  # type: ignore[assignment]
        if isinstance(one, nn.RNNBase):
            one._init_flat_weights()  # it has a list of its parameters
    module.train(mode)


def _with_memory(shape: Tensor, like: Tensor) -> Tensor:
    known = _MEMORY.get(shape)
    found: Tensor | None = None if known is None else known()
    if found is None or found.device != like.device:
        dtype = like.dtype if shape.is_floating_point() else shape.dtype
        found = torch.empty_like(shape, device=like.device, dtype=dtype)
        if isinstance(shape, nn.Parameter):
            found = nn.Parameter(found, shape.requires_grad)
        _MEMORY[shape] = weakref.ref(found)
    return found


def _without_values(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of a module without values; the network may use the module, or a tensor of it, elsewhere."""
    if id(module) in made:
        return made[id(module)]
    copied = made[id(module)] = object.__new__(type(module))
    vars(copied).update(vars(module))
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            vars(copied)[name] = type(value)((key, _rebound(hook, copied)) for key, hook in value.items())
    hidden = module._non_persistent_buffers_set
    tables: dict[str, Any] = {
        "_parameters": {name: _shape_of(one) for name, one in module._parameters.items()},
        "_buffers": {name: one if name in hidden else _shape_of(one) for name, one in module._buffers.items()},
        "_modules": {
            name: None if one is None else _without_values(one, made) for name, one in module._modules.items()
        },
    }
    vars(copied).update(tables)
    return copied


def _rebound(hook: Any, module: nn.Module) -> Any:
    """Return a hook that torch calls with its module, for another one: it would keep no module alive, nor be copied."""
    if isinstance(hook, _WrappedHook) and hook.with_module:
        return _WrappedHook(hook.hook, module)
    return hook


def _shape_of(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    known: Tensor | None = _SHAPES.get(tensor)
    if known is not None and known.shape == tensor.shape and known.requires_grad == tensor.requires_grad:
        return known
    empty = torch.empty_like(tensor, device="meta")
    found = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty.detach()
    _SHAPES[tensor] = found
    return found


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor | nn.Module) for leaf in tree_leaves(value))
