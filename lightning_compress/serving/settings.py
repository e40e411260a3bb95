"""The settings of a controller: ways to run one network, each with an accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.outputs import select_output


@dataclass(frozen=True)
class Setting:
    """One way to run a network.

    Attributes:
        name: Its name in tables and in the history.
        run: What is called with the network's inputs; a module must be in evaluation mode.
        accuracy: How good its outputs are; larger is better.
    """

    name: str
    run: Callable[..., Any]
    accuracy: float

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise ValueError(f"Setting {self.name!r}: run must be a module or a function; got {self.run!r}.")
        if not math.isfinite(self.accuracy):
            raise ValueError(f"Setting {self.name!r}: accuracy must be a finite number; got {self.accuracy!r}.")


class Point(Protocol):
    """What a setting is made of, such as an operating point of `EarlyExitHeads`."""

    @property
    def name(self) -> str: ...

    @property
    def network(self) -> nn.Module: ...


def measured_settings(
    points: Iterable[Point] | Mapping[str, Callable[..., Any]],
    batches: Iterable[tuple[ExampleInputs, Tensor]],
    *,
    output: str | int | None = None,
    right: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[Setting]:
    """Return a setting for each way to run a network, with its accuracy over some batches.

    Args:
        points: Operating points, such as `module.operating_points()`, or callables by name.
        batches: Inputs and targets that the network was not trained on.
        output: Key, position or attribute of the logits, where more than a tensor is returned.
        right: A function from an output and the targets to how good the output is for each sample; None: whether the
            largest logit is the target's.

    Raises:
        ValueError: There is no point or no batch, or a network is in training mode.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> ways = {"same": lambda x: x, "always 0": lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2)}
        >>> [(one.name, one.accuracy) for one in measured_settings(ways, [(x, y)])]
        [('same', 1.0), ('always 0', 0.5)]
    """
    runs = points if isinstance(points, Mapping) else {point.name: point.network for point in points}
    if not runs:
        raise ValueError("There is no way to run the network: fit the module first, or pass callables by name.")
    for name, run in runs.items():
        check_mode(Setting(name, run, 0.0))
    good, samples = dict.fromkeys(runs, 0.0), 0
    with torch.no_grad():
        for inputs, targets in batches:
            samples += len(targets)
            for name, run in runs.items():
                found = select_output(call(run, inputs), output, f"Setting {name!r}")
                hits = found.argmax(1) == targets if right is None else right(found, targets)
                good[name] += float(hits.double().sum())
    if not samples:
        raise ValueError("There is no batch on which the accuracy of the settings could be measured.")
    return [Setting(name, run, good[name] / samples) for name, run in runs.items()]


def check_mode(setting: Setting) -> None:
    """Refuse a module in training mode, which would normalize by its batch and drop activations.

    Raises:
        ValueError: It is.
    """
    if isinstance(setting.run, nn.Module) and setting.run.training:
        raise ValueError(f"The network of setting {setting.name!r} is in training mode: call eval() on it first.")


def without_dominated(settings: Sequence[Setting], table: Mapping[str, Mapping[int, float]]) -> list[Setting]:
    """Return the settings, fastest first, but those that another one beats: as accurate, and as fast at every size.

    Args:
        settings: With different names.
        table: Seconds by name and batch size.

    Example:
        >>> settings = [Setting(name, abs, accuracy) for name, accuracy in [("a", 0.9), ("b", 0.8), ("c", 0.7)]]
        >>> table = {"a": {1: 3.0}, "b": {1: 1.0}, "c": {1: 2.0}}
        >>> [one.name for one in without_dominated(settings, table)]
        ['b', 'a']
    """
    kept: list[Setting] = []
    for one in sorted(settings, key=lambda one: (-one.accuracy, sum(table[one.name].values()))):
        if not any(all(table[other.name][n] <= s for n, s in table[one.name].items()) for other in kept):
            kept.append(one)
    return sorted(kept, key=lambda one: sum(table[one.name].values()))
