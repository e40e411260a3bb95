"""How long each setting takes on this machine, by batch size."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call, first_samples
from lightning_compress.measure.footprint import accelerators_of, seconds_in_turns, summarize_latency
from lightning_compress.serving.settings import Setting


def measure_latencies(
    settings: Sequence[Setting],
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int] | None = None,
    repeats: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[int, float]]:
    """Return the seconds of every setting on a machine as calm as it gets, by name and batch size.

    The settings run in turns, as in `measure.footprint.time_in_turns`; on a GPU the clock is read after it has
    finished.

    Args:
        settings: What is measured.
        example_inputs: A batch of the largest size that is measured.
        batch_sizes: None: that of the example inputs.
        repeats: The number of timed runs of each setting, for each size.
        clock: Returns the time in seconds.

    Raises:
        ValueError: A batch size is below 1 or above that of the example inputs, or `repeats` is below 1.
    """
    most = batch_size(example_inputs)
    sizes = sorted(set([most] if batch_sizes is None else batch_sizes))
    if not sizes or sizes[0] < 1 or sizes[-1] > most:
        raise ValueError(f"batch_sizes must be from 1 to the {most} samples of the example inputs; got {batch_sizes}.")
    if repeats < 1:
        raise ValueError(f"repeats is the number of timed runs and must be at least 1; got {repeats!r}.")
    devices = set().union(*(accelerators_of(one.run, example_inputs) for one in settings))
    table: dict[str, dict[int, float]] = {one.name: {} for one in settings}
    busy = False
    for size in sizes:
        inputs = first_samples(example_inputs, size)
        with torch.no_grad():
            calls = {one.name: partial(call, one.run, inputs) for one in settings}
            found = summarize_latency(seconds_in_turns(calls, devices, repeats=repeats, clock=clock))
        for name, latency in found.items():
            table[name][size] = latency.seconds
            busy |= latency.busy
    if busy:
        warnings.warn(
            "The machine was busy while the settings were timed: measure() again when it is free.", stacklevel=3
        )
    return table


def seconds_at(latencies: Mapping[int, float], size: int) -> float:
    """Return the seconds at any batch size: on straight lines between the measured ones.

    Below the smallest measured size it is that one's time, above the largest the last line goes on; with a single
    measured size the time grows in proportion.

    Example:
        >>> [seconds_at({8: 2.0, 16: 3.0}, size) for size in (1, 12, 32)]
        [2.0, 2.5, 5.0]
        >>> seconds_at({8: 2.0}, 16)
        4.0
    """
    sizes = sorted(latencies)
    if size <= sizes[0]:
        return latencies[sizes[0]]
    upper = next((one for one in sizes if one >= size), sizes[-1])
    lower = max((one for one in sizes if one < upper), default=0)
    low = latencies.get(lower, 0.0)
    high = max(latencies[upper], low)  # noise apart, more samples take no less time
    return low + (high - low) * (size - lower) / (upper - lower)
