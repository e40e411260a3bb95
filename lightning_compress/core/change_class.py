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


class Absent(Tensor):
    """A tensor that has left its module: it shows its type and shape, has no values, and takes none."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (name.endswith("_") and not name.startswith("__")) or name == "__setitem__" or func in _SETTERS:
            absent = next(one for one in tree_leaves((args, kwargs)) if isinstance(one, Absent))
            raise RuntimeError(
                f"This tensor of shape {_sizes(absent)} has left the network, because its layer was replaced: it has "
                f"no values, and what {name} writes into it would be lost. Write into the parameters() of the layer."
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            return found.as_subclass(Absent) if func in _VIEWS and type(found) is Tensor else found


class AbsentParameter(Absent, nn.Parameter):
    """A parameter that has left its module."""

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> AbsentParameter:
        return torch.Tensor._make_subclass(cls, data, requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsentParameter:
        with torch._C.DisableTorchFunctionSubclass():
            found = AbsentParameter(torch.empty_like(self).detach(), self.requires_grad)
        memo[id(self)] = found
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _absent, (_sizes(self), self.stride(), self.dtype, self.requires_grad)


def _absent(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, requires_grad: bool
) -> AbsentParameter:
    return AbsentParameter(torch.empty_strided(shape, strides, dtype=dtype, device="meta"), requires_grad)


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(tensor.shape)


_GET, _SET = "__get__", "__set__"
_SETTERS = [getattr(getattr(Tensor, name), _SET) for name in ("data", "requires_grad")]
_VIEWS = [getattr(Tensor.data, _GET), Tensor.detach, Tensor.__getitem__]


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
        _convert(self._dense, fn, self._like.device)
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

    def __setattr__(self, name: str, value: Any) -> None:
        dense, own = vars(self).get("_dense"), [vars(self).get(one, {}) for one in TABLES[:3]]
        was = () if dense is None else (*dense.entries["_parameters"], *dense.entries["_buffers"])
        if dense is not None and name in was and not any(name in one for one in own):
            raise AttributeError(
                f"This {dense.kind.__name__} is replaced by a {type(self).__name__}, which would not use a {name}. Its "
                f"parameters are {', '.join(one for one, _ in self.named_parameters()) or 'none'}."
            )
        super().__setattr__(name, value)


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


def _convert(dense: Dense, fn: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """Give the tensors without values the dtypes that a function gives to tensors, as code may read their dtypes."""
    shown = nn.Module()
    vars(shown).update({name: dense.entries[name] for name in TABLES})
    for tensor in (*shown.parameters(), *shown.buffers()):
        if tensor.is_meta:
            dtype = fn(torch.empty(0, dtype=tensor.dtype, device=device)).dtype
            with torch._C.DisableTorchFunctionSubclass():
                tensor.data = tensor.data.to(dtype)  # it stays the same tensor for all its owners


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
    like = tensor.shape, tensor.dtype, tensor.requires_grad
    if known is not None and (known.shape, known.dtype, known.requires_grad) == like:
        return known
    empty = torch.empty_like(tensor, device="meta")
    found = AbsentParameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty.detach()
    _SHAPES[tensor] = found
    return found


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor | nn.Module) for leaf in tree_leaves(value))
