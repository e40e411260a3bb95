"""The costs of a network with exits, part by part: multiply-accumulates, or milliseconds measured here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call
from lightning_compress.core.hooks import hooked
from lightning_compress.early_exit.network import EarlyExitNetwork
from lightning_compress.early_exit.rules import Unit
from lightning_compress.early_exit.static import Served
from lightning_compress.measure.footprint import time_in_turns
from lightning_compress.measure.macs import count_macs

_REPEATS = 15


class Costs(NamedTuple):
    """Costs per sample of the K + 1 stages between exits, without heads, and of the K heads."""

    stages: tuple[float, ...]
    heads: tuple[float, ...]


def costs_of(early: EarlyExitNetwork, inputs: ExampleInputs, unit: Unit = "macs") -> Costs:
    """Return what stages and heads of a network with exits cost per sample.

    Args:
        early: The network, in evaluation mode.
        inputs: A batch, whose size is that for which milliseconds are measured.
        unit: "macs" as `count_macs` counts them, or "ms", medians of passes in turns.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> early = EarlyExitNetwork(network, {"1": nn.Linear(8, 2)}, None, torch.randn(3, 4)).eval()
        >>> costs_of(early, torch.randn(6, 4))
        Costs(stages=(32.0, 16.0), heads=(16.0,))
    """
    exits = len(early.exits)
    features = _features(early, inputs)
    networks: dict[str, tuple[nn.Module, ExampleInputs]] = {
        **{f"to {k}": (Served(early, exit=k), inputs) for k in range(1, exits + 2)},
        **{
            f"head {k}": (head, feature) for k, (head, feature) in enumerate(zip(early.heads, features, strict=True), 1)
        },
    }
    if unit == "macs":
        with evaluating(early):
            found = {name: float(count_macs(network, given)[0]) for name, (network, given) in networks.items()}
    else:
        samples = batch_size(inputs)
        timed = time_in_turns(networks, repeats=_REPEATS)
        found = {name: 1000.0 * latency.seconds / samples for name, latency in timed.items()}
    heads = tuple(found[f"head {k}"] for k in range(1, exits + 1))
    reached = [0.0, *(max(found[f"to {k}"] - head, 0.0) for k, head in enumerate(heads, 1)), found[f"to {exits + 1}"]]
    for k in range(1, len(reached)):  # what is measured scatters
        reached[k] = max(reached[k], reached[k - 1])
    return Costs(tuple(after - before for before, after in pairwise(reached)), heads)


def _features(early: EarlyExitNetwork, inputs: ExampleInputs) -> Sequence[Tensor]:
    """Return what the heads get for a batch."""
    found: dict[int, Tensor] = {}
    handles = (
        head.register_forward_pre_hook(lambda _, args, k=k: found.__setitem__(k, args[0].detach()))
        for k, head in enumerate(early.heads)
    )
    with hooked(*handles), evaluating(early):
        for k in range(len(early.heads)):
            call(Served(early, exit=k + 1), inputs)
    return [found[k] for k in range(len(early.heads))]
