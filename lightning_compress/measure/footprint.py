"""Measures the parameters, multiply-accumulates, file size, latency and memory of a network."""

from __future__ import annotations

import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call, tensors
from lightning_compress.measure.macs import count_macs

T = TypeVar("T")

_CALM = 0.15  # largest spread with which the median is used
_SAME = 1.1  # largest ratio of two halves of the passes with which the machine does not count as busy
_WARM_UP = 3  # untimed forward passes at the start, for allocators, kernel choice and compilation


@dataclass(frozen=True)
class Footprint:
    """The measured costs of a network on given example inputs; see `measure`.

    Attributes:
        parameters: The number of entries of all parameters; a shared parameter counts once.
        nonzero: The number of these entries that are not zero.
        macs: The multiply-accumulates of a forward pass, per sample; those with zeros count like all others.
        bytes: The size of a file of the network, as the given `file_bytes` returned it.
        latency: The seconds of a forward pass of the whole batch; see `time_in_turns`.
        peak_memory: The bytes of parameters and buffers, plus the largest number of bytes of tensors that are alive
            together during a forward pass.
        uncounted: The operators that ran but are missing from `macs`, because torch's counter has no formula for them.
    """

    parameters: int
    nonzero: int
    macs: int
    bytes: int
    latency: float
    peak_memory: int
    uncounted: tuple[str, ...]


def measure(
    model: nn.Module, example_inputs: ExampleInputs, *, repeats: int, file_bytes: Callable[[nn.Module], int]
) -> Footprint:
    """Measure the costs of a network in evaluation mode, without changing it.

    `count_macs` counts the MACs, and `compare_latency` measures the latency; to compare two networks, call the latter
    with both. The peak of memory is p + max_t a(t), where p is the bytes of parameters and buffers, and a(t) is the
    bytes of the tensors that the forward pass made and that are alive at time t, without the inputs. On CUDA a(t) is
    the allocator's count (whose peak statistics are reset). On other devices a(t) counts the tensors that operators
    return, without temporary memory inside kernels. For a compiled network, MACs and memory are those of the network
    before compilation.

    Args:
        model: Any module. Its parameters, gradients, buffers, modes and hooks, and torch's random state, do not change.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments; batch first, on the
            model's device.
        repeats: The number of forward passes that are timed.
        file_bytes: A function that writes the network to a file and returns the file's size.

    Raises:
        ValueError: `model` is not a module or has no values yet, the inputs hold no sample or are on another device, or
            `repeats` is below 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = net[0].weight.data[:4].zero_()
        >>> cost = measure(net, torch.randn(16, 4), repeats=5, file_bytes=lambda model: 232)
        >>> cost.parameters, cost.nonzero, cost.macs, cost.uncounted
        (58, 42, 48, ())
    """
    _check(model, example_inputs)
    parameters = list(model.parameters())
    latency = compare_latency({"model": (model, example_inputs)}, repeats=repeats)["model"]
    with evaluating(model):
        macs, uncounted = count_macs(model, example_inputs)
        peak_memory = _resident_bytes(model) + _forward_bytes(model, example_inputs)
    return Footprint(
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzero=sum(int(torch.count_nonzero(parameter != 0)) for parameter in parameters),
        macs=macs,
        bytes=file_bytes(model),
        latency=latency,
        peak_memory=peak_memory,
        uncounted=uncounted,
    )


@dataclass(frozen=True)
class Latency:
    """The latency of one of several networks that were timed in turns.

    Attributes:
        seconds: The seconds of a forward pass of the whole batch.
        spread: The interquartile range of the timed passes, divided by their median.
        busy: Whether the machine was too busy to compare these seconds with those of the other networks.
    """

    seconds: float
    spread: float
    busy: bool


def time_in_turns(networks: Mapping[str, tuple[nn.Module, ExampleInputs]], *, repeats: int = 30) -> dict[str, Latency]:
    """Time the forward passes of several networks in turns, in evaluation mode without gradients.

    In each turn every network runs once, in a random order, so that all networks meet the same state of the machine.
    After three untimed passes, each pass is timed until the device has finished. If no network's spread exceeds 15 %,
    `seconds` is the median. Otherwise other processes interrupt some passes, and `seconds` is the lowest decile, which
    an uninterrupted pass takes. `busy` is True if the ratio to the first network's seconds (with one network, the
    seconds) changes by more than 10 % between passes of even and odd numbers, or between the first and second half.

    Args:
        networks: A model and its example inputs, by name.
        repeats: The number of timed forward passes of each network.

    Raises:
        ValueError: A model or its inputs are refused as by `measure`, or `repeats` is below 1.

    Example:
        >>> net, x = nn.Linear(64, 64), torch.randn(8, 64)
        >>> list(time_in_turns({"dense": (net, x), "compressed": (net, x)}, repeats=4))
        ['dense', 'compressed']
    """
    if repeats < 1:
        raise ValueError(f"repeats is the number of timed forward passes and must be at least 1; got {repeats!r}.")
    accelerators: set[torch.device] = set()
    with ExitStack() as stack:
        for model, example_inputs in networks.values():
            _check(model, example_inputs)
            accelerators |= accelerators_of(model, example_inputs)
            stack.enter_context(evaluating(model))
        calls = {name: partial(call, model, inputs) for name, (model, inputs) in networks.items()}
        seconds = seconds_in_turns(calls, accelerators, repeats=repeats, clock=time.perf_counter)
    return summarize_latency(seconds)


def seconds_in_turns(
    calls: Mapping[str, Callable[[], object]],
    accelerators: Iterable[torch.device] = (),
    *,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Return the seconds of every call, by name, timed in turns as `time_in_turns` describes.

    Args:
        calls: What is timed, by name.
        accelerators: The devices that must have finished before the clock is read.
        repeats: The number of timed turns, after three untimed ones.
        clock: Returns the time in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)  # in a fixed order, a periodic process could interrupt the same network each time
    for turn in range(-_WARM_UP, repeats):
        for name in shuffled.sample(list(calls), len(calls)):
            elapsed = timed(calls[name], accelerators, clock)[1]
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def summarize_latency(seconds: Mapping[str, Sequence[float]]) -> dict[str, Latency]:
    """Summarize the seconds of passes that were timed in turns, as `time_in_turns` describes.

    Args:
        seconds: The seconds of each pass, in order, by network; all networks have the same number of passes.

    Example:
        >>> quiet = summarize_latency({"dense": [2.0, 2.1, 2.0, 2.0], "compressed": [1.0, 1.0, 1.1, 1.0]})
        >>> quiet["dense"].seconds, quiet["dense"].busy
        (2.0, False)
        >>> summarize_latency({"dense": [2.0, 2.0, 9.0, 9.0], "compressed": [9.0, 9.0, 2.0, 2.0]})["dense"].busy
        True
    """
    spreads = {name: _spread(values) for name, values in seconds.items()}
    calm = all(spread <= _CALM for spread in spreads.values())
    estimate = statistics.median if calm else _low
    busy = _busy(seconds, estimate)
    return {name: Latency(estimate(values), spreads[name], busy) for name, values in seconds.items()}


def compare_latency(networks: Mapping[str, tuple[nn.Module, ExampleInputs]], *, repeats: int = 30) -> dict[str, float]:
    """Return the seconds of a forward pass of each network, timed in turns; see `time_in_turns`.

    Args:
        networks: A model and its example inputs, by name.
        repeats: The number of timed forward passes of each network.

    Raises:
        ValueError: A model or its inputs are refused as by `measure`, or `repeats` is below 1.

    Example:
        >>> dense, compressed, x = nn.Linear(1024, 1024), nn.Linear(1024, 256), torch.randn(64, 1024)
        >>> seconds = compare_latency({"dense": (dense, x), "compressed": (compressed, x)})
        >>> speed_up = seconds["dense"] / seconds["compressed"]
    """
    return {name: latency.seconds for name, latency in time_in_turns(networks, repeats=repeats).items()}


def _spread(values: Sequence[float]) -> float:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / max(statistics.median(ordered), 1e-12)


def _low(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 10]


def _busy(seconds: Mapping[str, Sequence[float]], estimate: Callable[[Sequence[float]], float]) -> bool:
    length = min(map(len, seconds.values()))
    if length < 4:
        return False  # too few passes to compare halves
    half = length // 2
    for one, other in [(slice(0, None, 2), slice(1, None, 2)), (slice(0, half), slice(half, None))]:
        ratios = []
        for part in (one, other):
            found = [estimate(values[part]) for values in seconds.values()]
            ratios.append([value / found[0] for value in found] if len(found) > 1 else found)
        if any(max(a, b) > _SAME * min(a, b) for a, b in zip(*ratios, strict=True)):
            return True
    return False


def _check(model: nn.Module, example_inputs: ExampleInputs) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(
                f"{name} of {type(model).__name__} has no values yet (it is lazy, or on the meta device): run or load "
                f"the model first."
            )
    batch_size(example_inputs)
    homes = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    places = {tensor.device for tensor in tensors(example_inputs)}
    if homes and homes.isdisjoint(places):  # some inputs, such as lengths, belong on the CPU
        raise ValueError(
            f"example_inputs are on {_names(places)}, but the model is on {_names(homes)}: move them, for instance "
            f"with lightning_compress.core.example_inputs.to_device."
        )


def _names(devices: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def accelerators_of(model: object, inputs: ExampleInputs) -> set[torch.device]:
    """Return the devices other than the CPU that hold the inputs, or tensors of the model if it is a module."""
    owned = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return {tensor.device for tensor in chain(owned, tensors(inputs)) if tensor.device.type != "cpu"}


def timed(action: Callable[[], T], accelerators: Iterable[torch.device], clock: Callable[[], float]) -> tuple[T, float]:
    """Return the result of an action and its seconds, until these devices have finished."""
    for device in accelerators:
        torch.accelerator.synchronize(device)
    start = clock()
    result = action()
    for device in accelerators:
        torch.accelerator.synchronize(device)
    return result, clock() - start


def _resident_bytes(model: nn.Module) -> int:
    return sum(int(storage.nbytes()) for storage in _storages([*model.parameters(), *model.buffers()]).values())


def _forward_bytes(model: nn.Module, example_inputs: ExampleInputs) -> int:
    devices = [device for device in accelerators_of(model, example_inputs) if device.type == "cuda"]
    if not devices:
        live = _LiveBytes()
        with live:
            call(model, example_inputs)
        return live.peak
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    before = [torch.cuda.memory_allocated(device) for device in devices]
    call(model, example_inputs)
    peaks = [torch.cuda.max_memory_allocated(device) for device in devices]
    return sum(peaks) - sum(before)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make and that have not been freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = _storages((args, kwargs))  # views and in-place results have the storage of an input
        out = func(*args, **kwargs)
        for address, storage in _storages(out).items():
            if address not in known:
                self._live += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return out

    def _release(self, count: int) -> None:
        self._live -= count


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
    return {storage._cdata: storage for storage in (leaf.untyped_storage() for leaf in leaves)}
