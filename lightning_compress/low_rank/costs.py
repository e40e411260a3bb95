"""What layers cost, and what the parts that would take their place cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from torch import nn

Cost = Literal["parameters", "macs", "latency"]
Shapes = Sequence[tuple[int, ...]]


class Costs(NamedTuple):
    """The parameters of a layer, and its multiply-accumulates for a batch."""

    parameters: int
    macs: int


def costs_of(parts: Iterable[nn.Module], shapes: Shapes) -> Costs:
    """Return the costs of layers that run one after the other, for each shape of the first one's input.

    Example:
        >>> costs_of([nn.Conv2d(4, 2, 3, padding=1, bias=False), nn.Conv2d(2, 8, 1)], [(1, 4, 5, 5)])
        Costs(parameters=96, macs=2200)
    """
    parts = list(parts)
    macs = 0
    for shape in shapes:
        for part in parts:
            shape, some = _through(part, shape)
            macs += some
    return Costs(sum(parameter.numel() for part in parts for parameter in part.parameters()), macs)


def _through(part: nn.Module, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return the shape of what a layer returns, and its multiply-accumulates."""
    if isinstance(part, nn.Embedding):
        return (*shape, part.embedding_dim), 0
    if isinstance(part, nn.Linear):
        return (*shape[:-1], part.out_features), part.weight.numel() * math.prod(shape[:-1])
    assert isinstance(part, nn.modules.conv._ConvNd)
    assert not isinstance(part.padding, str)
    dims = len(part.kernel_size)
    sizes = zip(shape[-dims:], part.kernel_size, part.stride, part.padding, part.dilation, strict=True)
    places = [(size + 2 * pad - gap * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, gap in sizes]
    batch = shape[: -dims - 1]
    return (*batch, part.out_channels, *places), part.weight.numel() * math.prod(batch) * math.prod(places)


def by_macs(measured: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Return the seconds for a number of MACs, on straight lines between measured ones.

    Fewer than were measured take no less time, and more take longer in proportion.

    Example:
        >>> seconds = by_macs([(200, 3.0), (100, 2.0)])
        >>> [seconds(macs) for macs in (50, 100, 150, 300)]
        [2.0, 2.0, 2.5, 4.5]
    """
    points = sorted(measured)

    def seconds(macs: float) -> float:
        above = next((one for one in points if one[0] >= macs), None)
        if above is None:
            return points[-1][1] * macs / points[-1][0]
        below = max((one for one in points if one[0] <= macs), default=above)
        if above[0] == below[0]:
            return above[1]
        return below[1] + (above[1] - below[1]) * (macs - below[0]) / (above[0] - below[0])

    return seconds
