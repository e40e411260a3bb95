"""What modules get and return while a network runs, and how a stand-in would return it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.hooks import Removable

Path = tuple[int | str, ...]  # to an argument: its position or name, then keys within it
_CONSTANTS = (bool, int, float, str, type(None))
_EQUAL = 1e-12  # relative, in double precision
_STRIDES = (2, 4, 8, 16)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Returned:
    """A tensor that a module has returned, with the arguments of the call that equal it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    equals: frozenset[Path]


@dataclass
class Calls:
    """The calls of one module, one for each run of the network.

    Attributes:
        module: The module.
        inputs: For each call, the shape and the type of each tensor among the arguments.
        outputs: For each call what it has returned: a `Returned`, a constant, or tuples and lists of these.
        most: How often it ran within one run of the network, at most.
        odd: The name of a type that it returns and that no file describes.
    """

    module: nn.Module
    inputs: list[dict[Path, tuple[tuple[int, ...], torch.dtype]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    most: int = 0
    odd: str = ""
    _now: int = 0

    def begin(self) -> None:
        """Count anew, because the network runs again."""
        self._now = 0

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note one call."""
        self._now += 1
        self.most = max(self.most, self._now)
        if self._now > 1:
            return
        given = dict(_tensors(args, kwargs))
        self.inputs.append({path: (tuple(one.shape), one.dtype) for path, one in given.items()})
        self.outputs.append(self._read(output, given))

    def _read(self, output: Any, given: Mapping[Path, Tensor]) -> Any:
        if isinstance(output, Tensor):
            equals = frozenset(path for path, one in given.items() if _same(one, output))
            return Returned(tuple(output.shape), output.dtype, equals)
        if type(output) in (tuple, list):
            return type(output)(self._read(one, given) for one in output)
        if not isinstance(output, _CONSTANTS):
            self.odd = type(output).__name__
            return None
        return output


def watch(network: nn.Module, paths: Iterable[str]) -> tuple[dict[str, Calls], list[Removable]]:
    """Note the calls of some modules from now on; return them, and the handles that end this."""
    found = {path: Calls(network.get_submodule(path)) for path in paths}

    def noting(calls: Calls) -> Any:  # a function, whose content `entries_restored` leaves alone
        return lambda _module, args, kwargs, output: calls.note(args, kwargs, output)

    return found, [one.module.register_forward_hook(noting(one), with_kwargs=True) for one in found.values()]


def described(
    calls: Calls, returns: Literal["input", "zeros"], *, thin: bool = False, dense: bool = False
) -> dict[str, Any] | None:
    """Describe a stand-in that returns as a module did; None if that can't be described.

    Args:
        calls: Of the module.
        returns: What is in the place of the first tensor that it returned: one of its arguments, which it has always
            equalled; or zeros.
        thin: Whether sizes that never change are 1 in the zeros.
        dense: Whether the zeros have a memory of their own, in which code may write.
    """
    if calls.odd or calls.most != 1 or not calls.outputs:
        return None
    first = [returns]

    def one(outputs: list[Any]) -> dict[str, Any] | None:
        some = outputs[0]
        if any(type(other) is not type(some) for other in outputs):
            return None
        if isinstance(some, Returned):
            wanted = first.pop() if first else "any"
            common = frozenset.intersection(*(other.equals for other in outputs))
            if wanted != "zeros" and common:
                return {"input": list(min(common, key=str))}
            return None if wanted == "input" else _zeros(calls, outputs, thin=thin, dense=dense)
        if type(some) in (tuple, list):
            if len({len(other) for other in outputs}) > 1:
                return None
            items = [one(list(parts)) for parts in zip(*outputs, strict=True)]
            kind = "tuple" if type(some) is tuple else "list"
            return None if any(item is None for item in items) else {"items": items, "kind": kind}
        return {"constant": some} if all(other == some for other in outputs) else None

    return one(calls.outputs)


def _zeros(calls: Calls, outputs: list[Returned], *, thin: bool, dense: bool) -> dict[str, Any] | None:
    common = [path for path in calls.inputs[0] if all(path in given for given in calls.inputs)]
    floats = [path for path in common if calls.inputs[0][path][1].is_floating_point]
    dtype = outputs[0].dtype
    paths = floats if dtype.is_floating_point else floats or common
    if not paths:
        return None
    like = paths[0]
    inputs = [given[like][0] for given in calls.inputs]
    sizes = [_size(calls.module, dim, inputs, outputs) for dim in range(len(outputs[0].shape))]
    if any(size is None for size in sizes):
        return None
    found: dict[str, Any] = {"zeros": [1 if thin and isinstance(one, int) else one for one in sizes]}
    found["like"] = list(like)
    if dense:
        found["dense"] = True
    if not dtype.is_floating_point:
        found["dtype"] = str(dtype).removeprefix("torch.")
    return found


def _size(module: nn.Module, dim: int, inputs: list[tuple[int, ...]], outputs: list[Returned]) -> Any:
    """Return how a size of an output follows from the sizes of an input; None if it is not known."""
    if len({len(one) for one in inputs}) > 1 or len({len(one.shape) for one in outputs}) > 1:
        return None
    after = [one.shape[dim] for one in outputs]
    rank = len(inputs[0])

    def fits(d: int, a: int, b: int) -> bool:
        return all((one[d] + a) // b == size for one, size in zip(inputs, after, strict=True))

    if isinstance(module, _CONVS) and rank == len(outputs[0].shape) and dim >= rank - len(module.kernel_size):
        place = dim - (rank - len(module.kernel_size))
        stride = module.stride[place]
        padding = 0 if isinstance(module.padding, str) else module.padding[place]
        a = 2 * int(padding) - module.dilation[place] * (module.kernel_size[place] - 1) - 1 + stride
        if fits(dim, a, stride):
            return [dim, a, stride]
    if dim < rank and fits(dim, 0, 1):
        return [dim, 0, 1]
    strided = [(a, b) for b in _STRIDES for a in (b - 1, 0)]
    if rank == len(outputs[0].shape) and dim > 1:
        for a, b in strided:
            if fits(dim, a, b):
                return [dim, a, b]
    if len(set(after)) == 1:
        return after[0]
    return next(([d, 0, 1] for d in range(rank) if fits(d, 0, 1)), None)


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors among the arguments of a call, with their paths."""
    left: list[tuple[Path, Any]] = []
    left += [((key,), one) for key, one in kwargs.items()][::-1]
    left += [((place,), one) for place, one in enumerate(args)][::-1]
    while left:
        path, one = left.pop()
        if isinstance(one, Tensor):
            yield path, one
        elif type(one) in (tuple, list):
            left += [((*path, place), inner) for place, inner in enumerate(one)][::-1]
        elif type(one) is dict:
            left += [((*path, key), inner) for key, inner in one.items() if isinstance(key, str | int)][::-1]


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    scale = float(other.abs().amax()) if other.numel() else 0.0
    return bool((one - other).abs().amax() <= _EQUAL * scale) if other.numel() else True


def zeroed(output: Any) -> Any:
    """Return what a module has returned, with zeros in the place of the first tensor."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    if type(output) in (tuple, list) and leaves:
        return type(output)(torch.zeros_like(one) if one is leaves[0] else one for one in output)
    return output
