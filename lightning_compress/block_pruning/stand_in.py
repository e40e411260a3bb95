"""Modules without parameters that stand in for those of blocks that have left a network.

The code around a block can't be changed, and goes on calling its modules. So each of these modules becomes a stand-in,
in place: it has no parameters and no children, and returns its input, or zeros of the shape that the code expects. What
it returns is described by plain values, which a file can hold:

    {"input": [0]}                       the first argument; {"input": ["x"]} is the one named x
    {"zeros": [[0, 0, 1], 64], "like": [0]}
                                         zeros of as many rows as the first argument has, and 64 columns. The three
                                         numbers are a dimension d of that argument, and a and b in (size of d + a) // b
    {"items": [...], "kind": "tuple"}    a tuple, or a list, of these
    {"constant": None}                   the same at each call
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.records import RecordError, shown

Described = Mapping[str, Any]
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_PLAIN = (bool, int, float, str, type(None))
_DTYPES = {str(one).removeprefix("torch."): one for one in (torch.bool, torch.int32, torch.int64)}


class StandIn(nn.Module):
    """A module that stands in for one of a block that has left: it returns its input or zeros, and has no parameters.

    Attributes:
        described: What it returns, as the file's first lines show it.
        block: The name of the block that has left, with which it was made.
        macs: The multiply-accumulates for one sample that the block has saved, on the first of its stand-ins; 0 on the
            others.
    """

    described: Described
    block: str
    macs: int
    _dense: Dense
    _like: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _answer(self.described, args, kwargs)

    def extra_repr(self) -> str:
        """Return what it stands in for, and what it returns."""
        return f"{self._dense.kind.__name__} of block {self.block!r}, {_said(self.described)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._like = fn(self._like)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        # Code may look at the device or the shape of weights, as torch's transformer layers do before they run.
        dense = self.__dict__.get("_dense")
        for table in (*(dense.entries[one] for one in _TABLES[:3]), dense.entries) if dense is not None else ():
            if name in table:
                return table[name]
        return super().__getattr__(name)


@dataclass
class Dense:
    """What a module was before it became a stand-in, with which it can become what it was.

    Attributes:
        kind: Its class.
        entries: Its tables of tensors and children, and its attributes that held tensors or modules. Parameters and
            saved buffers have no values: they are on the meta device.
    """

    kind: type[nn.Module]
    entries: dict[str, Any]


def replace(module: nn.Module, described: Described, *, block: str = "", macs: int = 0) -> Callable[[], None]:
    """Make a module a stand-in, in place, and return a function that undoes it.

    The module keeps its identity, its mode, its hooks, and its attributes that are neither tensors nor modules.

    Args:
        module: The module.
        described: What it returns from now on.
        block: The name of the block that leaves.
        macs: The multiply-accumulates that leave with it.
    """
    own, kind = vars(module), type(module)
    like = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0)).detach()
    held = {
        name: value
        for name, value in own.items()
        if name in _TABLES or (not name.endswith("_hooks") and _holds_tensors(value))
    }
    for name in held:
        del own[name]
    itself = nn.Module()
    vars(itself).update({name: held[name] for name in _TABLES})
    empty = {name: vars(_without_values(itself, {}))[name] for name in _TABLES}
    own |= {"_parameters": {}, "_buffers": {}, "_modules": {}, "_non_persistent_buffers_set": set()}
    module.__class__ = StandIn
    added = {
        "described": described,
        "block": block,
        "macs": macs,
        "_dense": Dense(kind, held | empty),
        "_like": torch.empty(0, dtype=like.dtype, device=like.device),
    }
    shadowed = {name: own[name] for name in added if name in own}
    own |= added

    def undo() -> None:
        for name in added:
            del own[name]
        own.update(shadowed | held)
        module.__class__ = kind

    return undo


def _without_values(module: nn.Module, made: dict[int, Any]) -> nn.Module:
    """Return a copy of a module without values; the network may use the module, or a tensor of it, elsewhere."""
    if id(module) in made:
        copied: nn.Module = made[id(module)]
        return copied
    copied = made[id(module)] = object.__new__(type(module))
    vars(copied).update(vars(module))
    hidden = module._non_persistent_buffers_set
    tables: dict[str, Any] = {
        "_parameters": {name: _shape_of(one, made) for name, one in module._parameters.items()},
        "_buffers": {name: one if name in hidden else _shape_of(one, made) for name, one in module._buffers.items()},
        "_modules": {
            name: None if one is None else _without_values(one, made) for name, one in module._modules.items()
        },
    }
    vars(copied).update(tables)
    return copied


def _shape_of(tensor: Tensor | None, made: dict[int, Any]) -> Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in made:
        empty = torch.empty_like(tensor, device="meta")
        made[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty.detach()
        )
    found: Tensor = made[id(tensor)]
    return found


def restore(module: StandIn) -> None:
    """Make a stand-in the module that it was, with undefined values of its parameters and saved buffers."""
    dense, like, own = module._dense, module._like, vars(module)
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the shapes are held, so that no other tensor gets their id

    def with_memory(shape: Tensor) -> Tensor:
        if id(shape) not in made:
            dtype = like.dtype if shape.is_floating_point() else shape.dtype
            empty = torch.empty_like(shape, device=like.device, dtype=dtype)
            is_parameter = isinstance(shape, nn.Parameter)
            made[id(shape)] = (shape, nn.Parameter(empty, shape.requires_grad) if is_parameter else empty)
        return made[id(shape)][1]

    mode = module.training
    for name in ("described", "block", "macs", "_dense", "_like", *_TABLES):
        own.pop(name, None)
    own.update(dense.entries)
    module.__class__ = dense.kind  # type: ignore[assignment]
    for one in module.modules():
        for table in (one._parameters, one._buffers):
            for name, tensor in list(table.items()):
                if tensor is not None and tensor.is_meta:
                    table[name] = with_memory(tensor)  # type: ignore[assignment]
        if isinstance(one, nn.RNNBase):
            one._init_flat_weights()  # it has a list of its parameters
    module.train(mode)


def stand_ins(network: nn.Module) -> dict[str, StandIn]:
    """Return the stand-ins in a network, by path."""
    return {path: one for path, one in network.named_modules() if isinstance(one, StandIn)}


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor | nn.Module) for leaf in tree_leaves(value))


# ---------------------------------------------------------------------- what a stand-in returns


def _answer(described: Described, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if "input" in described:
        return argument(described["input"], args, kwargs)
    if "zeros" in described:
        like = argument(described["like"], args, kwargs)
        sizes = [one if isinstance(one, int) else (like.shape[one[0]] + one[1]) // one[2] for one in described["zeros"]]
        dtype = _DTYPES.get(described.get("dtype", ""), like.dtype)
        if described.get("dense", False):
            return like.new_zeros(sizes, dtype=dtype)
        return like.new_zeros((), dtype=dtype).expand(sizes)
    if "items" in described:
        items = [_answer(one, args, kwargs) for one in described["items"]]
        return tuple(items) if described["kind"] == "tuple" else items
    return described["constant"]


def argument(path: list[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return an argument of a call: the first key is a position or a name, further keys lead into it."""
    found: Any = args[path[0]] if isinstance(path[0], int) else kwargs[path[0]]
    for key in path[1:]:
        found = found[key]
    return found


def _said(described: Described) -> str:
    if "input" in described:
        return f"returns its input {described['input'][0]}"
    if "zeros" in described:
        return "returns zeros"
    return "returns " + ", ".join(_said(one).removeprefix("returns ") for one in described.get("items", ())) or "None"


def check_described(described: Any, *, deep: int = 0) -> None:
    """Raise a RecordError unless a value from a file describes what a stand-in returns."""
    if deep > 8 or not isinstance(described, Mapping):
        raise RecordError(f"The record of a block that has left says {shown(described)}, which is no output.")
    keys = set(described)
    good = False
    if keys == {"input"}:
        good = _is_path(described["input"])
    elif keys >= {"zeros", "like"} and keys <= {"zeros", "like", "dense", "dtype"}:
        sizes = described["zeros"]
        good = (
            _is_path(described["like"])
            and isinstance(sizes, list | tuple)
            and all(map(_is_size, sizes))
            and isinstance(described.get("dense", False), bool)
            and described.get("dtype", "bool") in _DTYPES
        )
    elif keys == {"items", "kind"}:
        good = described["kind"] in ("tuple", "list") and isinstance(described["items"], list | tuple)
        for one in described["items"] if good else ():
            check_described(one, deep=deep + 1)
    elif keys == {"constant"}:
        good = isinstance(described["constant"], _PLAIN)
    if not good:
        raise RecordError(f"The record of a block that has left says {shown(described)}, which is no output.")


def _is_path(path: Any) -> bool:
    return isinstance(path, list | tuple) and len(path) > 0 and all(type(key) in (int, str) for key in path)


def _is_size(size: Any) -> bool:
    if isinstance(size, list | tuple):
        return len(size) == 3 and all(type(one) is int for one in size) and size[2] > 0
    return type(size) is int and size >= 0
