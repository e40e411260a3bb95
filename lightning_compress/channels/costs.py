"""The cost of one channel: parameters, multiply-accumulates, or seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from lightning_compress.channels.groups import ChannelGroup
from lightning_compress.channels.removal import take
from lightning_compress.channels.slicing import Slices
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.measure.footprint import compare_latency
from lightning_compress.measure.macs import count_macs

Cost = Literal["parameters", "macs", "latency"]


def channel_costs(
    model: nn.Module, groups: Iterable[ChannelGroup], example_inputs: ExampleInputs, *, cost: Cost
) -> dict[str, float]:
    """Return the cost of one channel of each group, averaged over half of the channels.

        cost = (whole network - network without half of the channels) / number of these channels

    Args:
        model: The network, which stays as it was.
        groups: Free groups.
        example_inputs: As for `channel_groups`.
        cost: "parameters", "macs" (multiply-accumulates per sample) or "latency" (measured seconds). A cost is at least
            a thousandth of the largest one, because noise hides the latency of a small group.

    Example:
        >>> from lightning_compress.channels.find import channel_groups
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.zeros(2, 3)
        >>> channel_costs(net, channel_groups(net, x).free(), x, cost="parameters")  # 3 weights, 1 bias, 2 weights
        {'0': 6.0}
        >>> channel_costs(net, channel_groups(net, x).free(), x, cost="macs")
        {'0': 5.0}
    """
    measure = _MEASURES[cost]
    found: dict[str, float] = {}
    with evaluating(model):
        whole = measure(model, example_inputs)
        for group in groups:
            half = torch.arange(group.size - group.size // 2, group.size)
            slices = Slices()
            try:
                take(slices, model, [(group, half)])
                found[group.name] = (whole - measure(model, example_inputs)) / max(1, len(half))
            finally:
                slices.undo()
    largest = max(found.values(), default=0.0)
    if largest <= 0:  # the measured latencies are noise
        return dict.fromkeys(found, 1.0)
    return {name: max(value, largest / 1000) for name, value in found.items()}


def _parameters(model: nn.Module, example_inputs: ExampleInputs) -> float:
    return float(sum(parameter.numel() for parameter in model.parameters()))


def _macs(model: nn.Module, example_inputs: ExampleInputs) -> float:
    return float(count_macs(model, example_inputs)[0])


def _latency(model: nn.Module, example_inputs: ExampleInputs) -> float:
    return compare_latency({"": (model, example_inputs)})[""]


_MEASURES: Mapping[str, Callable[[nn.Module, ExampleInputs], float]] = {
    "parameters": _parameters,
    "macs": _macs,
    "latency": _latency,
}
