"""How long the branch of each residual block takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.tensors import named_tensors
from lightning_compress.measure.footprint import accelerators_of, seconds_in_turns, summarize_latency
from lightning_compress.stages.block import FoundBlocks
from lightning_compress.stages.blocks import arguments_of, found_in
from lightning_compress.stages.extract import Stage
from lightning_compress.stages.split import running

_REPEATS = 15


class BlockTimes(NamedTuple):
    """The blocks of a network, and how long their branches take.

    Attributes:
        found: The blocks.
        seconds: Of each branch for the batch, by the block's name.
        network: Seconds of the whole network.
    """

    found: FoundBlocks
    seconds: dict[str, float]
    network: float


def time_blocks(
    network: nn.Module, example_inputs: ExampleInputs, *, output: str | int | None = None, repeats: int = _REPEATS
) -> BlockTimes:
    """Find the residual blocks of a network, and time their branches for the batch of example inputs.

    Args:
        network: Stays as it is.
        example_inputs: The batch.
        output: As for `find_blocks`.
        repeats: How often each branch runs, in turns with the others and the network.

    Example:
        >>> import torch
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(256, 256)
        ...     def forward(self, x):
        ...         return x + self.layer(x)
        >>> times = time_blocks(nn.Sequential(nn.Linear(4, 256), Residual()), torch.randn(64, 4))
        >>> list(times.seconds)
        ['1.layer']
    """
    found = found_in(network, example_inputs, output)
    graph = found.branches.graph
    weights = graph.constants | named_tensors(network)
    parts = {name: branch.stage(graph, name) for name, branch in found.of.items()}
    wanted = {node for _, given in parts.values() for node in given}
    leaves = tree_leaves(dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs)
    with running(network):
        values = _Kept(graph.module, wanted)
        values.run(*arguments_of(graph, network, leaves))

        def runs(stage: Stage, given: Iterable[fx.Node]) -> Callable[[], object]:
            inputs = [*(values.kept[node] for node in given), *(weights[name] for name in stage.names)]
            return lambda: stage.module(*inputs)

        calls = {"": lambda: call(network, example_inputs)} | {
            name: runs(stage, given) for name, (stage, given) in parts.items()
        }
        devices = accelerators_of(network, example_inputs)
        timed = summarize_latency(seconds_in_turns(calls, devices, repeats=repeats, clock=time.perf_counter))
    seconds = {name: latency.seconds for name, latency in timed.items()}
    return BlockTimes(found.blocks, {name: seconds[name] for name in parts}, seconds[""])


class _Kept(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = result
        return result
