"""Units: sets of slices that must leave a network together.

    a node: one position of one dimension of one parameter    conv.weight, dim 0, position 5
    a tie: two nodes that must leave together                 ... ~ bn.weight, dim 0, position 5
    a unit: a connected component                             ... ~ next.weight, dim 1, position 5

An activation carries labels: for every position the node that it stands for. Structural operators (reshape, cat,
permute) act on the labels as they act on the values, so nothing has to be known about them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED = 0  # the node of every position that is no channel: inputs, places, looked-up rows


@dataclass(frozen=True, eq=False)
class Layer:
    """Labels of a tensor: a tensor of nodes with one entry in every dimension along which they are the same.

    `silent` says whether a channel whose producers are zero reads zero here.
    """

    nodes: Tensor
    silent: bool

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions along which the nodes vary."""
        return tuple(dim for dim, size in enumerate(self.nodes.shape) if size > 1)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph: its shape and its labels.

    `uniform`: every entry is the same or random, as in `torch.zeros`, so it would fit other widths just as well.
    `repeated`: dimensions along which one entry was expanded, which code does to any width as well.
    `parameter`: made from parameters alone.
    `zero`: every entry is zero, so that to add it changes nothing.
    """

    shape: tuple[int, ...]
    layers: tuple[Layer, ...] = ()
    uniform: bool = False
    parameter: bool = False
    repeated: frozenset[int] = frozenset()
    zero: bool = False

    def along(self, dim: int) -> list[Layer]:
        """The layers that vary along `dim`."""
        return [layer for layer in self.layers if dim % len(self.shape) in layer.dims] if self.shape else []


def compress(full: Tensor) -> Tensor:
    """Keep one entry of every dimension along which nothing varies.

    Example:
        >>> compress(torch.tensor([[1, 2], [1, 2]]))
        tensor([[1, 2]])
    """
    for dim in range(full.dim()):
        if full.shape[dim] > 1:
            first = full.narrow(dim, 0, 1)
            if full.stride(dim) == 0 or bool((full == first).all()):
                full = first
    return full


def align(nodes: Tensor, dims: int) -> Tensor:
    """Add leading dimensions, as broadcasting does."""
    return nodes.reshape((1,) * (dims - nodes.dim()) + tuple(nodes.shape))


class Units:
    """Ties between nodes, and the reasons for which nodes are frozen or inexact."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._ties: list[tuple[Tensor, Tensor]] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.inexact: list[tuple[Tensor, str]] = []
        self.consumed: list[Tensor] = []
        self.produced: list[Tensor] = []
        self.attributes: list[tuple[str, str, int | None, Tensor]] = []  # module, name, place in a tuple, nodes
        self.halved: list[Tensor] = []  # nodes of channels that slices take apart in the middle
        self.read = False  # whether the axis order has mattered

    def new(self, size: int) -> Tensor:
        """Make nodes."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Tie two tensors of nodes entry by entry; where one is fixed, the other is frozen for that `reason`."""
        shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
        a, b = a.expand(shape), b.expand(shape)
        a, b = a.reshape(-1), b.reshape(-1)
        held = (a == FIXED) | (b == FIXED)
        if bool(held.any()):
            self.freeze(torch.maximum(a, b)[held], reason)
            a, b = a[~held], b[~held]
        self._ties.append((a, b))

    def freeze(self, nodes: Tensor, reason: str) -> None:
        """Record that nodes can't leave."""
        nodes = nodes.reshape(-1)
        self.frozen.append((nodes[nodes != FIXED], reason))

    def mark_inexact(self, nodes: Tensor, reason: str) -> None:
        """Record that the network without these nodes computes something else than with zeros in their place."""
        nodes = nodes.reshape(-1)
        self.inexact.append((nodes[nodes != FIXED], reason))

    def solve(self) -> Tensor:
        """Return the unit of every node: the smallest node that it is tied to, directly or not.

        Example:
            >>> units = Units()
            >>> nodes = units.new(4)  # 1 2 3 4
            >>> units.tie(nodes[:2], nodes[2:], "")
            >>> units.solve()
            tensor([0, 1, 2, 1, 2])
        """
        root = torch.arange(self.count)
        if not self._ties:
            return root
        a, b = (torch.cat(side) for side in zip(*self._ties, strict=True))
        while True:
            root_a, root_b = root[a], root[b]
            differ = root_a != root_b
            if not bool(differ.any()):
                return root
            low, high = torch.minimum(root_a, root_b)[differ], torch.maximum(root_a, root_b)[differ]
            root.scatter_reduce_(0, high, low, "amin")
            while bool((root[root] != root).any()):
                root = root[root]


def split_apart(nodes: Tensor, dims: Sequence[int], axis_order: int, units: Units, reason: str) -> Tensor:
    """Group nodes that vary along several dimensions into slabs along one of them, and return one node per slab.

    A cut must leave a box: whole rows or whole columns of a matrix can leave, not single entries. `axis_order` chooses
    between them: slabs along the last of the dimensions for 0, along the one before for 1.
    """
    chosen = dims[max(0, len(dims) - 1 - axis_order)]
    first = nodes
    for dim in dims:
        if dim != chosen:
            first = first.narrow(dim, 0, 1)
    units.read = True
    units.tie(nodes, first, reason)
    return first


Structural = Callable[[Tensor], Tensor]


def restructure(value: Value, layer: Layer, operate: Structural) -> Tensor:
    """Apply a structural operator to a layer, in full size, and compress the result."""
    return compress(operate(layer.nodes.expand(value.shape)))
