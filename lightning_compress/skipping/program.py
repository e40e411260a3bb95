"""A network's graph in which each block runs for the samples that need it.

The graph without the branches of its blocks is one function, the trunk; at each residual sum it calls the block, which
gathers its samples, runs the branch, and adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lightning_compress.skipping.run import run_block, sort_batch, sorted_by_policy
from lightning_compress.stages.blocks import Found
from lightning_compress.stages.branches import Branch
from lightning_compress.stages.extract import FRESH, Rows, Stage, extract, is_carried, is_size, rows_of
from lightning_compress.stages.trace import SplitError, Trace


@dataclass(frozen=True, eq=False)
class BlockPart:
    """The branch of one block.

    Attributes:
        stage: Computes it of its inputs.
        rows: Where the samples stand in each of them; None: there are none.
        in_place: Whether the sum may be written into the shortcut's memory, which nothing reads afterwards.
    """

    stage: Stage
    rows: list[Rows | None]
    in_place: bool


@dataclass(frozen=True, eq=False)
class Program:
    """A network whose blocks run for some of the samples.

    Attributes:
        trunk: Called with a `Run`, and the tensors of the network's inputs.
        blocks: By their numbers; those that run for all or for nobody have none.
        answer: Where the samples stand in what the trunk returns.
    """

    trunk: Stage
    blocks: Mapping[int, BlockPart]
    answer: Rows

    def turn(self) -> bool:
        """Take the entries of samples that have several to take turns, not to be neighbours; False: none has."""
        turned = False
        for part in self.blocks.values():
            for i, rows in enumerate(part.rows):
                if rows is not None and rows.each > 1:
                    part.rows[i], turned = replace(rows, together=not rows.together), True
        return turned


def program_of(
    found: Found, names: Sequence[str], always: Sequence[int] = (), never: Sequence[int] = (), *, policy: bool = False
) -> Program:
    """Return the program of a network.

    Args:
        found: Its graph and blocks.
        names: Of the blocks that have gates, which are numbered in this order.
        always: The numbers of those that run for all samples.
        never: The numbers of those that run for nobody.
        policy: All decisions are made at once, and the batch may be sorted by them.

    Raises:
        SplitError: What a branch reads, or the answer, cannot be gathered for some of the samples.
    """
    graph = found.branches.graph
    branches = {k: found.of[name] for k, name in enumerate(names) if k not in always}
    answer = rows_of(graph, graph.answer, "the output")
    if answer is None:
        raise SplitError("The network's output has no dimension of samples.")
    run = fx.Graph().placeholder("run")
    parts: dict[int, BlockPart] = {}
    instead: dict[fx.Node, Any] = {}
    at = {node: branch.sum for branch in branches.values() for node in branch.nodes}  # where the trunk runs them
    inputs = {k: branch.inputs(graph) for k, branch in branches.items()}
    dynamic = [k for k in branches if k not in never]
    first = min(dynamic, key=lambda k: found.branches.order[branches[k].sum], default=None)
    source = found.of[names[0]].x
    for k, branch in branches.items():
        if k in never:
            instead[branch.sum] = _shortcut(branch)
            continue
        stage, rows = branch.stage(graph, names[k])
        in_place = _is_last(graph, branch, branches, at, source if policy and k == first else None)
        parts[k] = BlockPart(stage, list(rows.values()), in_place)
        calls = _call(k, branch, inputs[k], run, in_place)
        if policy and k == first:
            live = _live(graph, branch, at)
            calls = _planned(run, source, live, calls)
        instead[branch.sum] = calls
    nodes = [node for node in graph.nodes if node not in at and node.op != "placeholder"]
    nodes = _needed(graph, nodes, instead, branches, inputs, source if policy and dynamic else None)
    tensors = {node: rows_of(graph, node, "the input") for node in graph.inputs if _is_tensor(node)}
    trunk = extract(graph, nodes, {run: None, **tensors}, graph.answer, "the input", instead)
    return Program(trunk, parts, answer)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _shortcut(branch: Branch) -> Callable[[fx.Graph, dict[fx.Node, fx.Node]], fx.Node]:
    return lambda part, env: env[branch.shortcut]


def _call(k: int, branch: Branch, inputs: Sequence[fx.Node], run: fx.Node, in_place: bool) -> Any:
    def call(part: fx.Graph, env: dict[fx.Node, fx.Node]) -> fx.Node:
        args: tuple[Any, ...] = (env[run], k, env[branch.shortcut], env[branch.x], *(env[node] for node in inputs))
        node = part.call_function(run_block, args)
        node.meta = dict(branch.sum.meta) | {FRESH: in_place}
        return node

    return call


def _planned(run: fx.Node, source: fx.Node, live: Mapping[fx.Node, Rows], call: Any) -> Any:
    """Have the batch be sorted before the first block: all that is used later, if its samples can be told apart."""
    sortable = all(rows.each == 1 for rows in live.values())

    def planned(part: fx.Graph, env: dict[fx.Node, fx.Node]) -> fx.Node:
        part.call_function(sort_batch, (env[run], env[source], sortable))
        if sortable:
            for node, rows in live.items():
                moved = part.call_function(sorted_by_policy, (env[run], env[node], rows.dim))
                moved.meta = dict(node.meta)
                env[node] = moved
        result: fx.Node = call(part, env)
        return result

    return planned


def _uses(node: fx.Node, at: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """Return the nodes of the trunk at which a tensor is used: branches read theirs at their sums."""
    return [at.get(user, user) for user in node.users]


def _live(graph: Trace, branch: Branch, at: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, Rows]:
    """Return what is made before the sum of the first block and used from there on, where it has samples."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    now = place[branch.sum]
    found = {}
    for node in graph.nodes[:now]:
        if node in at or not is_carried(graph, node):
            continue
        later = [user for user in _uses(node, at) if place.get(user, now) >= now]
        if later and (rows := rows_of(graph, node, "the first block")) is not None:
            found[node] = rows
    return found


def _is_last(
    graph: Trace,
    branch: Branch,
    branches: Mapping[int, Branch],
    at: Mapping[fx.Node, fx.Node],
    source: fx.Node | None,
) -> bool:
    """Whether nothing reads the memory of a block's shortcut after its sum."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    now = place[branch.sum]
    shortcut = branch.shortcut
    left, family = [shortcut], set()
    while left:  # all views of one memory
        node = left.pop()
        if node in family:
            continue
        family.add(node)
        if node.op != "call_function":
            return False
        left += [user for user in node.users if _views(user)]
        if _views(node):
            left += node.all_input_nodes
        left += [
            one for one in node.all_input_nodes if any(node is b.sum and one is b.shortcut for b in branches.values())
        ]
    return all(
        place.get(user, len(place)) <= now
        for node in family
        for user in (*_uses(node, at), *([branch.sum] if node is source else []))
    )


def _views(node: fx.Node) -> bool:
    """Whether what an operator returns may share memory with what it reads."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return any(one.alias_info is not None for one in target._schema.returns)


def _needed(
    graph: Trace,
    nodes: list[fx.Node],
    instead: Mapping[fx.Node, Any],
    branches: Mapping[int, Branch],
    inputs: Mapping[int, Sequence[fx.Node]],
    source: fx.Node | None,
) -> list[fx.Node]:
    """Leave out what nothing uses without the branches that never run."""
    reads: dict[fx.Node, list[fx.Node]] = {}
    for k, branch in branches.items():
        reads[branch.sum] = [branch.shortcut]
        if instead[branch.sum] and k in inputs:
            reads[branch.sum] += [branch.x, *inputs[k]]
    needed: set[fx.Node] = set()
    left = [graph.answer, *([source] if source is not None else [])]
    while left:
        node = left.pop()
        if node not in needed:
            needed.add(node)
            left += reads.get(node, node.all_input_nodes)
    return [node for node in nodes if node in needed or is_size(node)]
