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
from typing import Any

import torch
from torch import nn

from lightning_compress.core.change_class import Changed, become_dense, change_class
from lightning_compress.core.records import RecordError, shown

Described = Mapping[str, Any]
_PLAIN = (bool, int, float, str, type(None))
_DTYPES = {str(one).removeprefix("torch."): one for one in (torch.bool, torch.int32, torch.int64)}


class StandIn(Changed):
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _answer(self.described, args, kwargs)

    def extra_repr(self) -> str:
        """Return what it stands in for, and what it returns."""
        return f"{self._dense.kind.__name__} of block {self.block!r}, {_said(self.described)}"


def replace(module: nn.Module, described: Described, *, block: str = "", macs: int = 0) -> Callable[[], None]:
    """Make a module a stand-in, in place, and return a function that undoes it.

    The module keeps its identity, its mode, its hooks, and its attributes that are neither tensors nor modules.

    Args:
        module: The module.
        described: What it returns from now on.
        block: The name of the block that leaves.
        macs: The multiply-accumulates that leave with it.
    """
    return change_class(module, StandIn, {"described": described, "block": block, "macs": macs})


def restore(module: StandIn) -> None:
    """Make a stand-in the module that it was, with undefined values of its parameters and saved buffers."""
    become_dense(module)


def stand_ins(network: nn.Module) -> dict[str, StandIn]:
    """Return the stand-ins in a network, by path."""
    return {path: one for path, one in network.named_modules() if isinstance(one, StandIn)}


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
