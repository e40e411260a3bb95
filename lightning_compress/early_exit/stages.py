"""The stages of a network between its exits, cut out of one graph, with all that crosses a cut carried across it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_compress.early_exit.trace import SplitError, Trace


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
    """A part of the network: from what crosses one cut, and weights, to an exit's features and what crosses the next.

    Attributes:
        module: Computes it, as a function of the carried tensors and then those of `names`.
        names: Of the parameters, buffers and constants.
    """

    module: fx.GraphModule
    names: tuple[str, ...]


class Stages:
    """A network cut at K layers: stages from any cut to any later one.

    Cuts are counted like exits, 1..K; 0 is the network's input and K + 1 its output. The stages have no weights of
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
        self._needed = self._behind([graph.answer, *(end.node for end in self._ends)], 0, len(graph.nodes))
        self._stages: dict[tuple[int, int, bool], Stage] = {}
        self.crossing: list[list[fx.Node]] = [
            [node for node in graph.inputs if isinstance(node.meta.get("val"), Tensor)],
            *(self._live(k) for k in range(1, len(layers) + 1)),
        ]
        self.rows: dict[fx.Node, Rows | None] = {}
        for cut, nodes in enumerate(self.crossing):
            for node in nodes:
                self.rows[node] = self._rows(node, cut)

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
        return any(map(_writes, self.graph.nodes[self._positions[cut] :]))

    def run(
        self,
        execute: Callable[[Stage, Sequence[Tensor]], Any],
        inputs: Sequence[Tensor],
        exits: Sequence[int],
        visit: Callable[[int, Tensor], Tensor | None],
        last: int | None = None,
    ) -> Tensor | None:
        """Run the stages, and return the network's output for the samples that stay to the end; None: there are none.

        Args:
            execute: Called with a stage and what it takes from the one before; returns what its module returns.
            inputs: The tensors among the leaves of the network's inputs.
            exits: At which samples may leave, ascending.
            visit: Called with the number of an exit and the features of the samples that are there. Returns the
                positions, among them, of those that stay; None: all.
            last: Where the run ends: the exit whose features are returned; None: the network's output.
        """
        final = len(self.layers) + 1 if last is None else last
        carried: Sequence[Tensor] = inputs
        start = 0
        for cut in exits:
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
        """Return the network up to an exit as a module of its own, which has these tensors and no others."""
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
        return [node for node in self.graph.nodes[:position] if node in used and self._is_carried(node)]

    def _is_carried(self, node: fx.Node) -> bool:
        return not (node in self.graph.names or node.op == "get_attr" or isinstance(node.meta.get("val"), _SYMBOLS))

    def _rows(self, node: fx.Node, cut: int) -> Rows | None:
        value = node.meta.get("val")
        where = f"at exit {self.layers[cut - 1]!r}" if cut else "at the input"
        if not isinstance(value, Tensor):
            raise SplitError(f"{node.name}, which crosses the cut {where}, is no tensor.")
        sizes = [self.graph.affine(size) for size in value.shape]
        of_batch = [(dim, size) for dim, size in enumerate(sizes) if size is None or size[0]]
        if not of_batch:
            return None
        (dim, size), *more = of_batch
        if more or size is None or size[1]:
            raise SplitError(
                f"{node.name} of shape {tuple(value.shape)}, which crosses the cut {where}, mixes the samples: they "
                f"stand in no one dimension of it."
            )
        return Rows(dim, size[0])

    def _behind(self, targets: Sequence[fx.Node], start: int, end: int) -> set[fx.Node]:
        """Find the nodes of a part of the graph that the targets depend on, and those that write into a tensor."""
        nodes = self.graph.nodes[start:end]
        inside = set(nodes)
        needed: set[fx.Node] = set()
        left = [*targets, *filter(_writes, nodes)]
        while left:
            node = left.pop()
            if node in inside and node not in needed:
                needed.add(node)
                left.extend(node.all_input_nodes)
        return needed

    def _stage(self, start: int, end: int, leave: bool) -> Stage:
        at_end = end > len(self.layers)
        feature = self.graph.answer if at_end else self._ends[end - 1].node
        carried = [] if leave else self.crossing[end]
        first, last = self._positions[start], self._positions[end]
        needed = self._behind([feature, *carried], first, last)
        nodes = [node for node in self.graph.nodes[first:last] if node in needed]
        graph = fx.Graph()
        env = {node: graph.placeholder(node.name) for node in self.crossing[start]}
        used = {one for node in nodes for one in node.all_input_nodes} | {feature}
        weights = [node for node in self.graph.names if node in used]
        env |= {node: graph.placeholder(node.name) for node in weights}
        samples: list[fx.Node] = []

        def known(node: fx.Node) -> Any:
            if node not in env and node.op == "get_attr":
                env[node] = graph.node_copy(node)
            if node in env:
                return env[node]
            return self._size(node, start, graph, env, samples)

        for node in nodes:
            if node.op != "get_attr" and not isinstance(node.meta.get("val"), _SYMBOLS):
                env[node] = graph.node_copy(node, known)
        graph.output(env[feature] if leave else (env[feature], *(env[node] for node in carried)))
        _reuse_memory(graph)
        return Stage(fx.GraphModule(self.graph.module, graph), tuple(self.graph.names[node] for node in weights))

    def _size(
        self, node: fx.Node, start: int, graph: fx.Graph, env: dict[fx.Node, fx.Node], samples: list[fx.Node]
    ) -> Any:
        """Compute a size anew from the number of samples that are left."""
        value = node.meta.get("val")
        size = self.graph.affine(value) if isinstance(value, torch.SymInt) else None
        if size is None:
            raise SplitError(f"{node.name} ({value}) depends on the number of samples in a way that is not linear.")
        if not size[0]:
            return size[1]
        if not samples:
            source = next(((one, rows) for one in self.crossing[start] if (rows := self.rows[one])), None)
            if source is None:
                raise SplitError(f"Nothing with samples crosses the cut at exit {self.layers[start - 1]!r}.")
            one, rows = source
            number = graph.call_function(torch.ops.aten.sym_size.int, (env[one], rows.dim))
            samples.append(graph.call_function(operator.floordiv, (number, rows.each)) if rows.each > 1 else number)
        result = samples[0]
        if size[0] != 1:
            result = graph.call_function(operator.mul, (result, size[0]))
        return graph.call_function(operator.add, (result, size[1])) if size[1] else result


def _reuse_memory(graph: fx.Graph) -> None:
    """Have activations and sums write into what they alone read, which is freshly made: memory is what they cost."""
    fresh: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in _FRESH:
            fresh.add(node)
        other = _IN_PLACE.get(node.target)
        first = node.args[0] if other else None
        if first not in fresh or len(first.users) > 1 or node.all_input_nodes.count(first) > 1:
            continue
        mine, its = node.meta["val"], first.meta["val"]
        if (mine.shape, mine.dtype) == (its.shape, its.dtype):
            node.target = other


_ATEN = torch.ops.aten
_IN_PLACE = {_ATEN.relu.default: _ATEN.relu_.default, _ATEN.add.Tensor: _ATEN.add_.Tensor}
_FRESH = {  # what they return is no view, and no gradient needs its values
    *(_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.linear.default),
    *(_ATEN.batch_norm.default, _ATEN.add.Tensor),
}
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


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
