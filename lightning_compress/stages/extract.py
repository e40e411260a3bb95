"""Parts of a graph as modules of their own, for any number of samples."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lightning_compress.stages.trace import SplitError, Trace, writes


@dataclass(frozen=True)
class Rows:
    """Where the samples stand in a tensor.

    Attributes:
        dim: The dimension that has them.
        each: How many entries of it belong to a sample.
        together: Whether the entries of a sample are neighbours; else those of all samples take turns.
    """

    dim: int
    each: int = 1
    together: bool = True

    def take(self, tensor: Tensor, samples: Tensor) -> Tensor:
        """Return the tensor of some of the samples."""
        if self.each == 1:
            return tensor.index_select(self.dim, samples)
        parts = torch.arange(self.each, device=samples.device)
        if self.together:
            index = samples[:, None] * self.each + parts
        else:
            index = parts[:, None] * (tensor.shape[self.dim] // self.each) + samples
        return tensor.index_select(self.dim, index.flatten())


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of the network.

    Attributes:
        module: Computes it, as a function of the tensors that it is given and then those of `names`.
        names: Of the parameters, buffers and constants.
        shapes: Of these, for which it was made.
        types: Of these, likewise.
    """

    module: fx.GraphModule
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    types: tuple[torch.dtype, ...]


def rows_of(graph: Trace, node: fx.Node, where: str) -> Rows | None:
    """Find the samples in a tensor; None: it has none.

    Args:
        graph: Has the node.
        node: Of the tensor.
        where: The place that it crosses, for the message.

    Raises:
        SplitError: It is no tensor, or its samples stand in no one dimension.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise SplitError(f"{node.name}, which crosses {where}, is no tensor.")
    sizes = [graph.affine(size) for size in value.shape]
    of_batch = [(dim, size) for dim, size in enumerate(sizes) if size is None or size[0]]
    if not of_batch:
        return None
    (dim, size), *more = of_batch
    if more or size is None or size[1]:
        raise SplitError(
            f"{node.name} of shape {tuple(value.shape)}, which crosses {where}, mixes the samples: they stand in no "
            f"one dimension of it."
        )
    return Rows(dim, size[0])


def behind(nodes: Sequence[fx.Node], targets: Iterable[fx.Node]) -> set[fx.Node]:
    """Find the nodes of a part of a graph that the targets depend on, and those that write into a tensor."""
    inside = set(nodes)
    needed: set[fx.Node] = set()
    left = [*targets, *filter(writes, nodes)]
    while left:
        node = left.pop()
        if node in inside and node not in needed:
            needed.add(node)
            left.extend(node.all_input_nodes)
    return needed


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a number of samples or another size, which a part computes anew."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_carried(graph: Trace, node: fx.Node) -> bool:
    """Whether a part must be given what a node computes: it is no weight, constant or size."""
    return not (node in graph.names or node.op == "get_attr" or is_size(node))


Instead = Callable[[fx.Graph, dict[fx.Node, fx.Node]], fx.Node]


def extract(
    graph: Trace,
    nodes: Iterable[fx.Node],
    given: Mapping[fx.Node, Rows | None],
    results: fx.Node | Sequence[fx.Node],
    where: str,
    instead: Mapping[fx.Node, Instead] | None = None,
) -> Stage:
    """Return a part of a graph, in which sizes are computed from the number of samples that it is given.

    Args:
        graph: The graph.
        nodes: The part's, in order.
        given: The tensors that the part takes, and where their samples stand.
        results: What it returns: one node, or a tuple.
        where: The place where it begins, for messages.
        instead: For some nodes, a function that adds others in their place: called with the new graph, and the nodes
            that were copied so far, which it may replace for those that follow; returns the one in the node's place.

    Raises:
        SplitError: A size cannot be computed anew.
    """
    part, several = fx.Graph(), not isinstance(results, fx.Node)
    returned = tuple(results) if isinstance(results, Sequence) else (results,)
    inner = list(nodes)
    env = {node: part.placeholder(node.name) for node in given}
    given_up = instead or {}
    used = {one for node in inner if node not in given_up for one in node.all_input_nodes} | set(returned)
    weights = [node for node in graph.names if node in used]
    env |= {node: part.placeholder(node.name) for node in weights}
    samples: list[fx.Node] = []

    def number() -> fx.Node:
        if not samples:
            source = next(((node, rows) for node, rows in given.items() if rows), None)
            if source is None:
                raise SplitError(f"Nothing with samples crosses {where}.")
            node, rows = source
            size = part.call_function(torch.ops.aten.sym_size.int, (env[node], rows.dim))
            samples.append(part.call_function(operator.floordiv, (size, rows.each)) if rows.each > 1 else size)
        return samples[0]

    def known(node: fx.Node) -> Any:
        if node not in env and node.op == "get_attr":
            env[node] = part.node_copy(node)
        if node in env:
            return env[node]
        value = node.meta.get("val")
        size = graph.affine(value) if isinstance(value, torch.SymInt) else None
        if size is None:
            raise SplitError(f"{node.name} ({value}) depends on the number of samples in a way that is not linear.")
        if not size[0]:
            return size[1]
        result = number()
        if size[0] != 1:
            result = part.call_function(operator.mul, (result, size[0]))
        return part.call_function(operator.add, (result, size[1])) if size[1] else result

    for node in inner:
        if node in given_up:
            env[node] = given_up[node](part, env)
        elif node.op != "get_attr" and not is_size(node):
            env[node] = part.node_copy(node, known)
    part.output(tuple(env[node] for node in returned) if several else env[returned[0]])
    _reuse_memory(part)
    like: list[Tensor] = [node.meta["val"] for node in weights]
    return Stage(
        fx.GraphModule(graph.module, part),
        tuple(graph.names[node] for node in weights),
        tuple(tuple(one.shape) for one in like),
        tuple(one.dtype for one in like),
    )


def _reuse_memory(graph: fx.Graph) -> None:
    """Have activations and sums write into what they alone read, which is freshly made: memory is what they cost."""
    fresh: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in _FRESH or node.meta.get(FRESH):
            fresh.add(node)
        other = _IN_PLACE.get(node.target)
        first = node.args[0] if other else None
        if first not in fresh or len(first.users) > 1 or node.all_input_nodes.count(first) > 1:
            continue
        mine, its = node.meta["val"], first.meta["val"]
        if (mine.shape, mine.dtype) == (its.shape, its.dtype):
            node.target = other


FRESH = "fresh"  # in a node's meta: nothing else has the memory of what it returns, and nobody reads it later
_ATEN = torch.ops.aten
_IN_PLACE = {_ATEN.relu.default: _ATEN.relu_.default, _ATEN.add.Tensor: _ATEN.add_.Tensor}
_FRESH = {  # what they return is no view, and no gradient needs its values
    *(_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.linear.default),
    *(_ATEN.batch_norm.default, _ATEN.add.Tensor),
}
