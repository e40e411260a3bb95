"""Which layers of a network run in the branches of its graph, begin them, and end them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from lightning_compress.stages.branches import Branch, Branches
from lightning_compress.stages.extract import is_size, rows_of
from lightning_compress.stages.trace import Mark, SplitError


class Layers:
    """The layers of a graph, by the marks of where they begin and end.

    Args:
        branches: Have the graph.
        macs: Of its nodes.
    """

    def __init__(self, branches: Branches, macs: Mapping[fx.Node, int]) -> None:
        self.branches, self.macs, self.graph = branches, macs, branches.graph
        self.runs: dict[str, list[tuple[Mark, Mark]]] = {
            name: list(zip(begins, self.graph.ends[name], strict=True))
            for name, begins in self.graph.begins.items()
            if len(begins) == len(self.graph.ends.get(name, ()))
        }
        self.once = {name: runs[0] for name, runs in self.runs.items() if len(runs) == 1}

    def around(self, nodes: Sequence[fx.Node]) -> str:
        """Return the deepest layer that runs all multiply-accumulates among nodes; in the network itself the last."""
        places = [self.branches.order[node] for node in nodes if self.macs.get(node)]
        fits = self._running(places)
        if fits:
            return max(fits)[1]
        last, inner = self._running(places[-1:]), self.inside(nodes)
        return next((name for _, name in sorted(last) if name in inner), max(last, default=(0, "forward"))[1])

    def _running(self, places: Sequence[float]) -> list[tuple[int, str]]:
        return [
            (begin.event, name)
            for name, runs in self.runs.items()
            for begin, end in runs
            if all(begin.position <= place < end.position for place in places)
        ]

    def inside(self, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
        """Return the maximal layers that run in a part of the graph alone."""
        part = set(nodes)
        found = [name for name in self.once if self._is_inside(name, part)]
        maximal = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
        return tuple(sorted(maximal, key=lambda name: self.once[name][0].event))

    def ending(self, branch: Branch) -> str | None:
        """Return the last layer such that a factor of its output is a factor of the branch."""
        ends, nodes = self._multiples(branch), set(branch.nodes)
        fits = [
            (end.position, self._is_inside(name, nodes), end.event, name)
            for name, (_, end) in self.once.items()
            if end.node in ends
        ]
        return max(fits)[-1] if fits else None

    def reading(self, branch: Branch, ends: str) -> str | None:
        """Return a layer that gets what the branch reads, before `ends` returns: one of the branch, or around it."""
        last = self.once[ends][1].event
        fits = [
            (begin.event, name)
            for name, (begin, _) in self.once.items()
            if begin.node is branch.x and begin.event < last
        ]
        first = min(self.branches.order[node] for node in branch.nodes)
        inner = [one for one in fits if self._is_inside(one[1], set(branch.nodes))]
        if inner:
            return min(inner)[1]
        before = [one for one in fits if self.once[one[1]][0].position <= first]
        return max(before)[1] if before else None

    def missing(self, branch: Branch, ends: str | None) -> str:
        """Say why hooks cannot multiply a branch."""
        outputs = self._multiples(branch)
        marks = self.graph.begins if ends else self.graph.ends
        twice = [name for name, found in marks.items() if len(found) > 1 and _meets(found, outputs, branch, ends)]
        if twice:
            return f"{twice[0]} runs {len(marks[twice[0]])} times in a forward pass, so that hooks see several blocks"
        if ends:
            return "no layer gets what it reads as its first tensor, which a hook could see"
        return "no layer returns its end with the samples first, which a hook could multiply"

    def _is_inside(self, name: str, nodes: set[fx.Node]) -> bool:
        begin, end = self.once[name]
        if end.node not in nodes:
            return False
        return all(
            node in nodes or is_size(node) or node.op in ("placeholder", "get_attr") or not node.users
            for node in self.graph.nodes
            if begin.position <= self.branches.order[node] < end.position
        )

    def _multiples(self, branch: Branch) -> set[fx.Node]:
        """Return the nodes of a branch of which it is a multiple: a factor of them is a factor of the branch."""
        nodes, found = set(branch.nodes), set()
        left: list[tuple[fx.Node, frozenset[fx.Node]]] = [(branch.end, frozenset())]
        while left:
            node, excluded = left.pop()
            if node in found or node not in nodes or node in excluded:
                continue
            found.add(node)
            name = node.target._schema.name.partition("::")[2] if hasattr(node.target, "_schema") else ""
            sources = node.all_input_nodes
            if name in _KEEP:
                left.append((sources[0], excluded))
            elif name in ("mul", "div"):
                factors = [sources[0], *sources[1:]] if name == "mul" else sources[:1]
                for one in factors:
                    rest = [other for other in sources if other is not one]
                    squared = len(node.args) > 1 and node.args[0] is node.args[1]
                    if not squared:
                        left.append((one, excluded | _made_of(rest, nodes)))
        return {node for node in found if self._samples_first(node)}

    def _samples_first(self, node: fx.Node) -> bool:
        try:
            rows = rows_of(self.graph, node, "the block")
        except SplitError:
            return False
        return rows is not None and rows.dim == 0 and rows.each == 1


_KEEP = frozenset(  # a factor of the input is a factor of the output
    [
        *("view", "_unsafe_view", "reshape", "transpose", "permute", "t", "flatten", "unflatten", "squeeze"),
        *("unsqueeze", "expand", "clone", "contiguous", "alias", "_to_copy", "to", "slice", "select", "narrow", "roll"),
        *("neg", "detach", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        *("adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "flip", "mean"),
        *("upsample_linear1d", "upsample_bilinear2d", "pixel_shuffle", "pixel_unshuffle", "movedim", "sum"),
    ]
)


def _made_of(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> frozenset[fx.Node]:
    """Return nodes and all of a branch of which they are made."""
    left, seen = list(nodes), set()
    while left:
        node = left.pop()
        if node not in seen and node in inside:
            seen.add(node)
            left += node.all_input_nodes
    return frozenset(seen)


def _meets(marks: list[Mark], outputs: set[fx.Node], branch: Branch, ends: str | None) -> bool:
    return any(mark.node is branch.x if ends else mark.node in outputs for mark in marks)
