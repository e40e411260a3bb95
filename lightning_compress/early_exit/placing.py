"""Layers that an exit can follow, and those at wanted shares of the network's cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.axes import BATCH
from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.hooks import hooked
from lightning_compress.measure.macs import macs_at_ends
from lightning_compress.stages.split import axes_of, running
from lightning_compress.stages.stages import Stages
from lightning_compress.stages.trace import SplitError, Trace, trace

_NEAR = 0.1  # of the network's cost: so much farther may a layer be where one tensor crosses


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layer that an exit can follow.

    Attributes:
        name: Qualified name of the module.
        share: Of the network's multiply-accumulates, those up to the end of the layer.
        shape: Of its output for one sample.
        tensors: How many cross a cut there; None: the network cannot be cut there, and runs whole batches.
    """

    name: str
    share: float
    shape: tuple[int, ...]
    tensors: int | None


def exit_candidates(
    network: nn.Module, example_inputs: ExampleInputs, *, output: str | int | None = None
) -> list[Candidate]:
    """Return the layers that an exit can follow, in the order in which they end.

    They run exactly once and return one tensor with the batch first, and something that costs multiply-accumulates
    comes after them.

    Args:
        network: Stays as it is.
        example_inputs: Some samples, batch first.
        output: Which tensor of the network's output is the answer, if it has several.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> for one in exit_candidates(network, Tensor(3, 4)):
        ...     print(one.name, round(one.share, 2), one.shape, one.tensors)
        0 0.67 (8,) 1
        1 0.67 (8,) 1
    """
    axes = axes_of(network, example_inputs, output)
    few = axes.resized({BATCH: 2})
    first, second = _outputs(network, few), _outputs(network, axes.resized({BATCH: 3}))
    names = [
        name
        for name, found in first.items()
        if len(found) == 1
        and isinstance(one := found[0], Tensor)
        and isinstance(other := second.get(name, [None])[0], Tensor)
        and one.dim() > 1
        and (one.shape[0], other.shape[0]) == (2, 3)
        and one.shape[1:] == other.shape[1:]
    ]
    with running(network):
        ends, total = macs_at_ends(network, few)
    names = [name for name in names if ends[name] < total]
    try:
        graph: Trace | None = trace(network, axes, names, output)
    except SplitError:
        graph = None
    return [
        Candidate(
            name=name,
            share=ends[name] / total,
            shape=tuple(first[name][0].shape[1:]),
            tensors=None if graph is None else _crossing(graph, name),
        )
        for name in names
    ]


def place_exits(
    network: nn.Module,
    example_inputs: ExampleInputs,
    fractions: Sequence[float] = (0.25, 0.5, 0.75),
    *,
    output: str | int | None = None,
) -> list[str]:
    """Return the layers that end nearest to shares of the network's multiply-accumulates, in that order.

    A layer at which one tensor crosses the cut, as at the end of a block, is preferred to one inside a block that is
    nearer by less than a tenth of the whole cost.

    Raises:
        ValueError: The fractions do not ascend between 0 and 1, or there are fewer different layers.

    Example:
        >>> network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
        >>> place_exits(network, Tensor(2, 4), (0.25, 0.5))
        ['1', '3']
    """
    wanted = list(fractions)
    if not wanted or sorted(set(wanted)) != wanted or not 0 < wanted[0] <= wanted[-1] < 1:
        raise ValueError(f"fractions={tuple(fractions)}: pass ascending shares of the network's cost between 0 and 1.")
    candidates = exit_candidates(network, example_inputs, output=output)
    places: dict[tuple[float, int | None], Candidate] = {}
    for one in candidates:  # the last and outermost layer of those that end with the same cost
        key = one.share, one.tensors
        if key not in places or one.name.count(".") <= places[key].name.count("."):
            places[key] = one
    left = sorted(places.values(), key=lambda one: one.share)
    chosen: list[Candidate] = []
    for i, fraction in enumerate(wanted):
        after = chosen[-1].share if chosen else 0.0
        open_places = [one for one in left if one.share > after]
        shares = sorted({one.share for one in open_places})
        to_keep = len(wanted) - i - 1  # for the fractions that follow
        if len(shares) <= to_keep:
            raise ValueError(
                f"{type(network).__name__} has {len({one.share for one in left})} places for exits, and {len(wanted)} "
                f"are wanted: name the layers, or pass fewer."
            )
        open_places = [one for one in open_places if one.share <= shares[len(shares) - to_keep - 1]]

        def distance(one: Candidate, fraction: float = fraction) -> float:
            return abs(one.share - fraction) + (0.0 if one.tensors in (1, None) else _NEAR)

        chosen.append(min(open_places, key=distance))
    return [one.name for one in chosen]


def _outputs(network: nn.Module, inputs: ExampleInputs) -> dict[str, list[Any]]:
    """Return what every module returned at each of its calls, in the order of the first."""
    found: dict[str, list[Any]] = {}

    def watch(name: str) -> Any:
        return lambda _module, _args, output: found.setdefault(name, []).append(output)

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in network.named_modules()
        if name and not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    ]
    with hooked(*handles), running(network):
        call(network, inputs)
    return found


def _crossing(graph: Trace, name: str) -> int | None:
    try:
        return len(Stages(graph, [name]).crossing[1])
    except SplitError:
        return None
