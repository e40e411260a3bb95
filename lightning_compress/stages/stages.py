"""The stages of a network between cuts, cut out of one graph, with all that crosses a cut carried across it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from lightning_compress.stages.extract import Rows, Stage, behind, extract, is_carried, rows_of
from lightning_compress.stages.trace import Trace, writes


class Stages:
    """A network cut at K layers: stages from any cut to any later one.

    Cuts are counted 1..K; 0 is the network's input and K + 1 its output. The stages have no weights of
    their own, and are the same for every copy of the network.

    Args:
        graph: The network's graph.
        layers: In the order in which they end.

    Raises:
        SplitError: What crosses a cut cannot be carried for a part of the samples.
    """

    def __init__(self, graph: Trace, layers: Sequence[str]) -> None:
        self.graph, self.layers = graph, tuple(layers)
        self._ends = [graph.ends[layer][0] for layer in layers]
        first = sum(node.op == "placeholder" for node in graph.nodes)
        self._positions = [first, *(end.position for end in self._ends), len(graph.nodes)]
        self._needed = behind(graph.nodes, [graph.answer, *(end.node for end in self._ends)])
        self._stages: dict[tuple[int, int, bool], Stage] = {}
        self.crossing: list[list[fx.Node]] = [
            [node for node in graph.inputs if isinstance(node.meta.get("val"), Tensor)],
            *(self._live(k) for k in range(1, len(layers) + 1)),
        ]
        self.rows: dict[fx.Node, Rows | None] = {}
        for cut, nodes in enumerate(self.crossing):
            for node in nodes:
                self.rows[node] = rows_of(graph, node, self._where(cut))

    def __deepcopy__(self, memo: Any) -> Stages:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what unpickles as None: the graph of another version of torch need not be the same."""
        return type(None), ()

    def between(self, start: int, end: int, *, leave: bool = False) -> Stage:
        """Return the stage from one cut to another; `leave`: it is the last one, so that nothing crosses its end."""
        key = start, end, leave or end > len(self.layers)
        if key not in self._stages:
            self._stages[key] = self._stage(*key)
        return self._stages[key]

    def writes_after(self, cut: int) -> bool:
        """Whether an operator after a cut writes into its input."""
        return any(map(writes, self.graph.nodes[self._positions[cut] :]))

    def run(
        self,
        execute: Callable[[Stage, Sequence[Tensor]], Any],
        inputs: Sequence[Tensor],
        cuts: Sequence[int],
        visit: Callable[[int, Tensor], Tensor | None],
        last: int | None = None,
    ) -> Tensor | None:
        """Run the stages, and return the network's output for the samples that stay to the end; None: there are none.

        Args:
            execute: Called with a stage and what it takes from the one before; returns what its module returns.
            inputs: The tensors among the leaves of the network's inputs.
            cuts: At which samples may leave, ascending.
            visit: Called with the number of a cut and what its layer returns for the samples that are there. Returns
                the positions, among them, of those that stay; None: all.
            last: Where the run ends: the cut whose layer's output is returned; None: the network's output.
        """
        final = len(self.layers) + 1 if last is None else last
        carried: Sequence[Tensor] = inputs
        start = 0
        for cut in cuts:
            stage = self.between(start, cut)
            feature, *carried = execute(stage, carried)
            stay = visit(cut, feature)
            del feature
            if stay is not None:
                if stay.shape[0] == 0:
                    return None
                carried = self.gather(cut, carried, stay)
            start = cut
        stage = self.between(start, final, leave=True)
        answer: Tensor = execute(stage, carried)
        return answer

    def gather(self, cut: int, carried: Sequence[Tensor], samples: Tensor) -> list[Tensor]:
        """Return what crosses a cut, of some of the samples."""
        where = [self.rows[node] for node in self.crossing[cut]]
        return [
            tensor if rows is None else rows.take(tensor, samples) for tensor, rows in zip(carried, where, strict=True)
        ]

    def alone(self, end: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the network up to a cut as a module of its own, which has these tensors and no others."""
        stage = self.between(0, end, leave=True)
        root, graph = nn.Module(), fx.Graph()
        carried = len(self.crossing[0])
        env: dict[fx.Node, fx.Node] = {}
        given = iter(stage.names)
        for i, node in enumerate(stage.module.graph.nodes):
            if node.op == "placeholder" and i >= carried:
                name = f"network.{next(given)}"
                _put(root, name, tensors[name.removeprefix("network.")])
                env[node] = graph.get_attr(name)
            else:
                if node.op == "get_attr":
                    setattr(root, node.target, getattr(stage.module, node.target))
                env[node] = graph.node_copy(node, env.__getitem__)
        return fx.GraphModule(root, graph)

    def _live(self, cut: int) -> list[fx.Node]:
        position = self._positions[cut]
        used = {self.graph.answer, *(end.node for end in self._ends[cut:])}
        for node in self.graph.nodes[position:]:
            if node in self._needed:
                used.update(node.all_input_nodes)
        return [node for node in self.graph.nodes[:position] if node in used and is_carried(self.graph, node)]

    def _stage(self, start: int, end: int, leave: bool) -> Stage:
        at_end = end > len(self.layers)
        feature = self.graph.answer if at_end else self._ends[end - 1].node
        results = [feature, *([] if leave else self.crossing[end])]
        first, last = self._positions[start], self._positions[end]
        needed = behind(self.graph.nodes[first:last], results)
        nodes = [node for node in self.graph.nodes[first:last] if node in needed]
        given = {node: self.rows[node] for node in self.crossing[start]}
        return extract(self.graph, nodes, given, feature if leave else results, self._where(start))

    def _where(self, cut: int) -> str:
        return f"the cut at {self.layers[cut - 1]!r}" if cut else "the input"


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(last, tensor)
    else:
        root.register_buffer(last, tensor)
