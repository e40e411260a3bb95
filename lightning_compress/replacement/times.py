"""How long a layer takes on this machine, and what would replace it, for the inputs that it sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.measure.footprint import seconds_in_turns, summarize_latency
from lightning_compress.replacement.find import Layer
from lightning_compress.replacement.layer import LayerShape, dense_layer, keeping_random_state
from lightning_compress.replacement.swap import Replaced, swap

_REPEATS = 15
K = TypeVar("K", bound=Hashable)


def time_forms(
    layer: Layer,
    forms: Mapping[K, tuple[type[Replaced], Mapping[str, Any]]],
    *,
    repeats: int = _REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, dict[K, float]]:
    """Return the seconds that all calls of a layer in one forward pass take, and those of other forms of it.

    They run in turns, on random inputs of the shapes that the layer sees, in evaluation mode, on the layer's device. No
    values of the layer are needed, and the global random generator stays where it is.

    Args:
        layer: As `find_layers` has found it.
        forms: The forms, by any name, with their numbers.
        repeats: How often each runs.
        clock: Returns the time in seconds.

    Example:
        >>> from lightning_compress.replacement.find import find_layers
        >>> layer = find_layers(nn.Sequential(nn.Linear(64, 64)), torch.zeros(2, 64)).layers["0"]
        >>> dense, others = time_forms(layer, {})
        >>> dense > 0, others
        (True, {})
    """
    of = layer.map.sizes
    generator = torch.Generator().manual_seed(0)
    inputs = [_input(of, shape, generator) for shape in layer.inputs]
    calls: dict[Any, Callable[[], object]] = {}
    with keeping_random_state(of):
        calls[_DENSE] = _runs(dense_layer(of), inputs)
        for name, (form, numbers) in forms.items():
            other = dense_layer(of)
            swap(other, form, numbers)
            calls[name] = _runs(other, inputs)
    devices = [of.device] if of.device.type != "cpu" else []
    with torch.no_grad():
        seconds = summarize_latency(seconds_in_turns(calls, devices, repeats=repeats, clock=clock))
    return seconds[_DENSE].seconds, {name: seconds[name].seconds for name in forms}  # type: ignore[index]


_DENSE: Any = object()


def _runs(module: nn.Module, inputs: list[Tensor]) -> Callable[[], object]:
    module.eval()
    return lambda: [module(x) for x in inputs]


def _input(of: LayerShape, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if of.kind == "embedding":
        return torch.randint(of.inputs, shape, generator=generator).to(of.device)
    return torch.randn(shape, generator=generator).to(of.device, of.dtype)
