"""The branches of residual sums in a graph.

A residual sum adds to a tensor x, its shortcut, what a branch F computes of it: s = x + F(x). The branch is the part of
the graph that nothing but the sum uses.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, fx

from lightning_compress.stages.extract import Rows, Stage, extract, is_carried, is_size, rows_of
from lightning_compress.stages.trace import SplitError, Trace

_ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True, eq=False)
class Branch:
    """The branch of a residual sum.

    Attributes:
        kind: "identity": the shortcut is what the branch reads. "projection": the shortcut has multiply-accumulates.
        sum: The node that adds.
        end: What it adds: the branch's last node.
        shortcut: To which it adds.
        x: What the branch reads.
        nodes: Of the branch, in order.
        macs: Multiply-accumulates, for one sample.
    """

    kind: Literal["identity", "projection"]
    sum: fx.Node
    end: fx.Node
    shortcut: fx.Node
    x: fx.Node
    nodes: tuple[fx.Node, ...]
    macs: int

    def inputs(self, graph: Trace) -> list[fx.Node]:
        """Return what the branch takes from the rest of the graph, without weights, constants and sizes."""
        inside = set(self.nodes)
        used = {one for node in self.nodes for one in node.all_input_nodes}
        return [node for node in graph.nodes if node in used and node not in inside and is_carried(graph, node)]

    def stage(self, graph: Trace, name: str) -> tuple[Stage, dict[fx.Node, Rows | None]]:
        """Return the branch as a part of the graph, and where the samples stand in what it takes.

        Raises:
            SplitError: It cannot run for some of the samples.
        """
        where = f"the block {name!r}"
        rows = {node: rows_of(graph, node, where) for node in self.inputs(graph)}
        return extract(graph, self.nodes, rows, self.end, where), rows


@dataclass(frozen=True, eq=False)
class Branches:
    """The branches of a graph.

    Attributes:
        graph: In which no branch is a sum of branches: x + (F(x) + G(x)) is written x + F(x) + G(x).
        found: The branches, in the order of their sums.
        refused: The last nodes of other sums' operands with multiply-accumulates, and why they are no branches.
        order: Where nodes stand in the graph, in the numbers of its marks.
    """

    graph: Trace
    found: tuple[Branch, ...]
    refused: Mapping[fx.Node, tuple[str, tuple[fx.Node, ...]]]
    order: Mapping[fx.Node, float]


def find_branches(graph: Trace, macs: Mapping[fx.Node, int]) -> Branches:
    """Return the branches of all residual sums.

    Args:
        graph: Is written to: sums of branches are taken apart. It must be functional.
        macs: Of nodes, for one sample.
    """
    return _Finder(graph, macs).run()


@dataclass(eq=False)
class _Finder:
    graph: Trace
    macs: Mapping[fx.Node, int]
    order: dict[fx.Node, float] = field(init=False)
    dependent: set[fx.Node] = field(init=False)
    shortcuts: dict[fx.Node, fx.Node] = field(default_factory=dict)
    found: list[Branch] = field(default_factory=list)
    refused: dict[fx.Node, tuple[str, tuple[fx.Node, ...]]] = field(default_factory=dict)
    left: dict[fx.Node, dict[fx.Node, tuple[str, tuple[fx.Node, ...]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = {node: float(i) for i, node in enumerate(self.graph.nodes)}
        self.dependent = set(self.graph.inputs)
        for node in self.graph.nodes:
            if not is_size(node) and any(one in self.dependent for one in node.all_input_nodes):
                self.dependent.add(node)

    def run(self) -> Branches:
        for node in list(self.graph.nodes):
            if _adds(node):
                self._sum(node)
        for node, reasons in self.left.items():  # of sums that were not taken apart
            if node.users and not self._projection(node):
                self.refused |= reasons
        nodes = [node for node in self.graph.answer.graph.nodes if node.op != "output"]
        return Branches(replace(self.graph, nodes=nodes), tuple(self.found), self.refused, self.order)

    def _sum(self, node: fx.Node) -> None:
        if len(node.all_input_nodes) != 2 or not _float(node):
            return
        first, second = node.all_input_nodes
        reasons: dict[fx.Node, tuple[str, tuple[fx.Node, ...]]] = {}
        cones = {end: self._cone(end, node) for end in (first, second)}
        for end, shortcut in ((second, first), (first, second)):
            cone = cones[end]
            if not self._macs(cone) or shortcut not in self.dependent:
                continue
            x = self._read(cone, self._chain(shortcut))
            if x is None:
                reasons[end] = "it does not read what it is added to", cone
            elif not _alike(node, end, shortcut):
                reasons[end] = "what it is added to has another shape or type", cone
            elif problem := self._samples(node, x):
                reasons[end] = problem, cone
            elif parts := self._parts(end, shortcut):
                self._sum(self._take_apart(node, end, shortcut, *parts))
                self._sum(node)
                return
            else:
                self.shortcuts[node] = shortcut
                self.found.append(Branch("identity", node, end, shortcut, x, cone, self._macs(cone)))
                return
        self.left[node] = reasons

    def _projection(self, node: fx.Node) -> bool:
        cones = {end: self._cone(end, node) for end in node.all_input_nodes}
        end, shortcut = sorted(cones, key=lambda one: -self._macs(cones[one]))
        if not self._macs(cones[shortcut]) or not _alike(node, end, shortcut):
            return False
        shared = [
            one for one in self._reached(cones[end]) if one in set(self._reached(cones[shortcut])) and _float(one)
        ]
        if not shared or self._samples(node, shared[0]):
            return False
        self.found.append(Branch("projection", node, end, shortcut, shared[0], cones[end], self._macs(cones[end])))
        return True

    def _cone(self, end: fx.Node, sum: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes that nothing but the sum's operand uses, in order."""
        if set(end.users) != {sum}:
            return ()
        inside: set[fx.Node] = set()
        left = [(-self.order[end], id(end), end)]
        seen = {end}
        while left:
            node = heapq.heappop(left)[2]
            if node.op == "placeholder" or not (node is end or all(user in inside for user in node.users)):
                continue
            inside.add(node)
            for one in node.all_input_nodes:
                if one not in seen:
                    seen.add(one)
                    heapq.heappush(left, (-self.order[one], id(one), one))
        return tuple(sorted(inside, key=self.order.__getitem__))

    def _macs(self, nodes: Iterable[fx.Node]) -> int:
        return sum(self.macs.get(node, 0) for node in nodes)

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """Return a tensor, and where it is a residual sum its shortcut, and so on."""
        chain = [node]
        while chain[-1] in self.shortcuts:
            chain.append(self.shortcuts[chain[-1]])
        return chain

    def _reached(self, cone: Iterable[fx.Node]) -> Iterator[fx.Node]:
        """Yield what a branch reads, and of what that is made alone, without multiply-accumulates: other branches may
        share a norm.
        """
        inside = set(cone)
        seen: set[fx.Node] = set()
        left = [one for node in inside for one in node.all_input_nodes if one not in inside and one in self.dependent]
        while left:
            node = left.pop(0)
            if node in seen:
                continue
            seen.add(node)
            yield node
            sources = [one for one in node.all_input_nodes if one in self.dependent]
            if len(sources) == 1 and not self.macs.get(node):
                left += sources

    def _read(self, cone: Iterable[fx.Node], chain: list[fx.Node]) -> fx.Node | None:
        reached = set(self._reached(cone))
        return next((one for one in chain if one in reached), None)

    def _samples(self, node: fx.Node, x: fx.Node) -> str:
        for one in (node, x):
            try:
                rows = rows_of(self.graph, one, "the block")
            except SplitError as error:
                return str(error)
            if rows is None or rows.dim or rows.each > 1:
                return "the samples do not stand in the first dimension"
        return ""

    def _parts(self, end: fx.Node, shortcut: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return two branches whose sum a branch is: they run, or not, on their own."""
        if not _adds(end) or len(end.all_input_nodes) != 2:
            return None
        first, second = end.all_input_nodes
        for one in (first, second):
            cone = self._cone(one, end)
            if not self._macs(cone) or self._read(cone, self._chain(shortcut)) is None or not _alike(end, one):
                return None
        return first, second

    def _take_apart(self, node: fx.Node, end: fx.Node, shortcut: fx.Node, one: fx.Node, other: fx.Node) -> fx.Node:
        """Write a + (b + c) as (a + b) + c, and return a + b."""
        with node.graph.inserting_before(node):
            inner = node.graph.call_function(_ADD, (shortcut, one))
        inner.meta = dict(node.meta)
        self.order[inner] = max(self.order[shortcut], self.order[one]) + 2.0**-20  # after them, before the next node
        self.dependent.add(inner)
        node.args = (inner, other)
        node.graph.erase_node(end)
        self.left.pop(end, None)
        return inner


def _adds(node: fx.Node) -> bool:
    return bool(node.target is _ADD and node.kwargs.get("alpha", 1) == 1)


def _float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _alike(node: fx.Node, *others: fx.Node) -> bool:
    mine = node.meta["val"]
    return all(_shape(one.meta["val"]) == _shape(mine) for one in others)


def _shape(value: Tensor) -> tuple[list[str], torch.dtype]:
    return [str(size) for size in value.shape], value.dtype
