"""Labels of tensors, and units: sets of positions that must leave a network together.

    a node: one position of one dimension of one parameter    conv.weight, dim 0, position 5
    a tie: two nodes that must leave together                 ... ~ bn.weight, dim 0, position 5
    a unit: a connected component                             ... ~ next.weight, dim 1, position 5

A unit may be a channel of a group, a whole head, or no channel at all, such as a position of a kernel or an output.

An activation carries labels: for every position the node that it belongs to. Structural operators (reshape, cat,
permute) rearrange the labels as they rearrange the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED = 0  # the node of every position that can never leave: inputs, places, looked-up rows


@dataclass(frozen=True, eq=False)
class Layer:
    """Labels of a tensor.

    Attributes:
        nodes: A tensor of nodes, with size 1 in every dimension along which they do not vary.
        silent: Whether entries of a channel are zero here when all slices that produce it are.
    """

    nodes: Tensor
    silent: bool

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions along which the nodes vary."""
        return tuple(dim for dim, size in enumerate(self.nodes.shape) if size > 1)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph: its shape and its labels.

    Attributes:
        shape: Its shape.
        layers: Its labels.
        uniform: Whether all entries are equal or random, as in `torch.zeros`, so that code can make it in any width.
        parameter: Whether it is computed from parameters and buffers alone.
        repeated: Dimensions along which one entry was expanded, which code can do to any width.
        zero: Whether all entries are zero.
    """

    shape: tuple[int, ...]
    layers: tuple[Layer, ...] = ()
    uniform: bool = False
    parameter: bool = False
    repeated: frozenset[int] = frozenset()
    zero: bool = False

    def along(self, dim: int) -> list[Layer]:
        """Return the layers that vary along `dim`."""
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
    """Ties between nodes, and what the rules of operators found out about nodes.

    Attributes:
        count: Number of nodes.
        frozen: Nodes that cannot leave, with the reason.
        inexact: Nodes without which the network computes something else than with zeros, with the reason.
        consumed: Nodes of slices that read channels.
        produced: Nodes of slices that produce channels, although others read them as well.
        attributes: Numbers that count nodes: module, name, place in a tuple, nodes.
        halved: Nodes of channels that slices take apart in the middle.
        read: Whether the axis order has mattered.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._ties: list[tuple[Tensor, Tensor]] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.inexact: list[tuple[Tensor, str]] = []
        self.consumed: list[Tensor] = []
        self.produced: list[Tensor] = []
        self.attributes: list[tuple[str, str, int | None, Tensor]] = []
        self.halved: list[Tensor] = []
        self.read = False

    def new(self, size: int) -> Tensor:
        """Make new nodes."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Tie two tensors of nodes entry by entry; where one is fixed, freeze the other for this reason."""
        shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
        a, b = a.expand(shape), b.expand(shape)
        a, b = a.reshape(-1), b.reshape(-1)
        held = (a == FIXED) | (b == FIXED)
        if bool(held.any()):
            self.freeze(torch.maximum(a, b)[held], reason)
            a, b = a[~held], b[~held]
        self._ties.append((a, b))

    def freeze(self, nodes: Tensor, reason: str) -> None:
        """Record that nodes cannot leave."""
        nodes = nodes.reshape(-1)
        self.frozen.append((nodes[nodes != FIXED], reason))

    def mark_inexact(self, nodes: Tensor, reason: str) -> None:
        """Record that the network computes something else without these nodes than with zeros in their place."""
        nodes = nodes.reshape(-1)
        self.inexact.append((nodes[nodes != FIXED], reason))

    def solve(self) -> Tensor:
        """Return the unit of every node: the smallest node to which it is tied, directly or not.

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
    """Tie nodes that vary along several dimensions into slabs along one of them, and return one node per slab.

    A cut must leave a box: whole rows or whole columns of a matrix can leave, but no single entries. With axis order 0
    the slabs lie along the last of the dimensions, with 1 along the one before.
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
