"""The residual blocks of a network, found in its graph and proved by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from lightning_compress.core.axes import Axes
from lightning_compress.core.evaluation import random_state_restored
from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.hooks import hooked
from lightning_compress.core.outputs import select_output
from lightning_compress.core.tensors import named_tensors
from lightning_compress.measure.macs import macs_of_nodes
from lightning_compress.stages.block import Block, FoundBlocks, chosen_blocks
from lightning_compress.stages.branch_hooks import gated
from lightning_compress.stages.branches import Branch, Branches, find_branches
from lightning_compress.stages.layers import Layers
from lightning_compress.stages.split import axes_of, differ, different, running
from lightning_compress.stages.trace import Trace, trace

__all__ = ["Block", "FoundBlocks", "chosen_blocks", "find_blocks"]


class Found(NamedTuple):
    """The blocks of a network, and where they are in its graph.

    Attributes:
        blocks: What `find_blocks` returns.
        branches: The graph.
        of: The branch of each block, by its name.
    """

    blocks: FoundBlocks
    branches: Branches
    of: dict[str, Branch]


def find_blocks(network: nn.Module, example_inputs: ExampleInputs, *, output: str | int | None = None) -> FoundBlocks:
    """Return the residual blocks of a network: sums s = x + F(x) whose branch F has multiply-accumulates.

    They are found in the graph that torch.export makes of the network, and proved: the network is run with hooks that
    multiply the branches of samples by 0 or 1, and so is the graph.

    Args:
        network: Stays as it is. The blocks are those of its evaluation mode.
        example_inputs: Some samples, batch first.
        output: Which tensor of the network's output is the answer: key, position or attribute.

    Raises:
        SplitError: torch.export cannot trace the network, or it runs with one number of samples only.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(x).relu())
        >>> found = find_blocks(nn.Sequential(nn.Linear(4, 4), Residual()), torch.randn(3, 4))
        >>> [(block.name, block.macs, block.modules) for block in found.blocks]
        [('1', 64, ('1.up', '1.down'))]
    """
    return found_in(network, example_inputs, output).blocks


def found_in(network: nn.Module, example_inputs: ExampleInputs, output: str | int | None) -> Found:
    """Return the blocks of a network with the graph in which they were found."""
    axes = axes_of(network, example_inputs, output)
    layers = [
        name
        for name, module in network.named_modules()
        if name and not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    ]
    graph = trace(network, axes, layers, output, functional=True)
    leaves = different(axes)
    arguments = arguments_of(graph, network, leaves)
    with running(network):
        of_batch = macs_of_nodes(graph.module, *arguments)
    samples = next(len(leaf) for leaf, named in zip(leaves, axes.named, strict=True) if named)
    macs = {node: number // samples for node, number in of_batch.items()}
    branches = find_branches(graph, macs)
    named, refused = _named(branches, Layers(branches, macs))
    named, unproved = _proved(network, branches.graph, named, axes, leaves, output)
    return _sorted_out(branches, named, refused | unproved, sum(macs.values()))


def arguments_of(graph: Trace, network: nn.Module, leaves: Sequence[Any]) -> list[Any]:
    """Return what the graph takes: the network's tensors, and the leaves of its inputs."""
    tensors = graph.constants | named_tensors(network)
    given = dict(zip(graph.inputs, leaves, strict=True))
    return [
        given[node] if node in given else tensors[graph.names[node]] for node in graph.nodes if node.op == "placeholder"
    ]


def _named(branches: Branches, layers: Layers) -> tuple[dict[Branch, Block], dict[str, str]]:
    """Return blocks for branches, and the reasons why others are none."""
    names: dict[str, int] = {}

    def named(nodes: Sequence[fx.Node]) -> str:
        name = layers.around(nodes)
        names[name] = names.get(name, 0) + 1
        return name if names[name] == 1 else f"{name}:{names[name]}"

    blocks: dict[Branch, Block] = {}
    refused: dict[str, str] = {}
    for branch in sorted(branches.found, key=lambda one: branches.order[one.end]):
        name = named(branch.nodes)
        ends = layers.ending(branch)
        reads = layers.reading(branch, ends) if ends else None
        if ends and reads:
            modules = layers.inside(branch.nodes)
            blocks[branch] = Block(name, branch.kind, reads, ends, modules, branch.macs)
        else:
            refused[name] = layers.missing(branch, ends)
    inner = {node for branch in branches.found for node in branch.nodes}
    for end, (reason, nodes) in branches.refused.items():
        if end not in inner:  # sums within branches, as of scores and masks, are of no interest
            refused[named(nodes)] = reason
    return blocks, refused


class _Gated(fx.Interpreter):
    """Runs a graph in which nodes are multiplied by factors per sample, and keeps what blocks read."""

    def __init__(self, graph: Trace, factors: Mapping[fx.Node, Tensor], kept: Sequence[fx.Node]) -> None:
        super().__init__(graph.module)
        self.factors, self.kept = factors, kept
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n in self.kept:
            self.seen[n] = found
        if n in self.factors:
            factors = self.factors[n]
            found = found * factors.to(found.dtype).view(-1, *(1,) * (found.dim() - 1))
        return found


def _proved(
    network: nn.Module,
    graph: Trace,
    named: dict[Branch, Block],
    axes: Axes,
    leaves: Sequence[Any],
    output: str | int | None,
) -> tuple[dict[Branch, Block], dict[str, str]]:
    """Leave out blocks whose hooks do not do in the network what they do in the graph."""
    if not named:
        return named, {}
    if not (reason := _wrong(network, graph, named, axes, leaves, output)):
        return named, {}
    proved: dict[Branch, Block] = {}
    refused: dict[str, str] = {}
    for branch, block in named.items():
        if reason := _wrong(network, graph, {branch: block}, axes, leaves, output):
            refused[block.name] = f"hooks at {block.reads} and {block.ends} were tried, and {reason}"
        else:
            proved[branch] = block
    return proved, refused


def _wrong(
    network: nn.Module,
    graph: Trace,
    named: Mapping[Branch, Block],
    axes: Axes,
    leaves: Sequence[Any],
    output: str | int | None,
) -> str:
    """Run the network with hooks that multiply branches by 0 or 1, and the graph likewise; say what differs."""
    branches, blocks = list(named), list(named.values())
    samples, device = next((len(leaf), leaf.device) for leaf, dims in zip(leaves, axes.named, strict=True) if dims)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randint(2, (samples,), generator=generator).float().to(device) for _ in blocks]
    seen: dict[int, Tensor] = {}

    def decide(k: int, x: Tensor) -> Tensor:
        seen[k] = x.clone()
        return factors[k]

    last = {branch.end: factor for branch, factor in zip(branches, factors, strict=True)}
    expected = _Gated(graph, last, [branch.x for branch in branches])
    with running(network), random_state_restored(network):
        answer = expected.run(*arguments_of(graph, network, leaves))
        with hooked(*gated(network, blocks, decide)):
            try:
                found = call(network, tree_unflatten(list(leaves), axes.spec))
            except (RuntimeError, ValueError) as error:
                return next(iter(str(error).splitlines()), type(error).__name__)
    for k, branch in enumerate(branches):
        if k not in seen:
            return "the block was not read"
        if seen[k].shape != expected.seen[branch.x].shape or differ([seen[k]], [expected.seen[branch.x]]):
            return "what the block reads is another tensor there"
    got = select_output(found, output, type(network).__name__)
    answer = answer[0] if isinstance(answer, (tuple, list)) else answer
    return differ([got], [answer]) or ""


def _sorted_out(branches: Branches, named: dict[Branch, Block], refused: dict[str, str], macs: int) -> Found:
    """Tell the innermost identity blocks, which are taken when none is named, from the others."""
    for branch, block in named.items():
        nodes = set(branch.nodes)
        within = [
            other.name
            for one, other in named.items()
            if one is not branch and one.kind == "identity" and one.sum in nodes
        ]
        if branch.kind == "projection":
            refused[block.name] = "its shortcut is a projection: it is taken when it is named"
        elif within:
            refused[block.name] = f"it holds the block {within[0]}: it is taken when it is named"
    of = {block.name: branch for branch, block in named.items()}
    return Found(FoundBlocks(tuple(named.values()), macs, refused), branches, of)
