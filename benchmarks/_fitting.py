"""How far a technique may go for a file of so many bytes: found before any training, by files of the dense weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lightning_compress import save_compressed
from lightning_compress.clustering.kmeans import assign, kmeans
from lightning_compress.core.select import select_parameters

SLACK = 0.98  # of a budget, before the training: trained weights take other bytes than the dense ones
AMOUNTS = [1 - 0.96**step for step in range(130, 0, -1)]  # of the weights, from 99.5 % on downwards
CLUSTERS = [2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256]
SHARES = [0.02 * 1.05**step for step in range(80)]  # of the parameters, up to 94 %
Choice = TypeVar("Choice", int, float)


def bytes_of(module: nn.Module, *, half: bool = True) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save_compressed(module, Path(folder) / "a.lcz", half=half).bytes


def fitting(budget: int, make: Callable[[Choice], nn.Module], choices: Sequence[Choice]) -> Choice | None:
    """Return the last choice, of those in the order of their bytes, whose network fits; None: not even the first.

    A choice with a ValueError goes too far: a later one may be possible.
    """
    low, high = -1, len(choices) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _size(make, choices[middle]) <= SLACK * budget:
            low = middle
        else:
            high = middle - 1
    return None if low < 0 or _size(make, choices[low]) == 0 else choices[low]


def _size(make: Callable[[Choice], nn.Module], choice: Choice) -> int:
    try:
        return bytes_of(make(choice))
    except ValueError:
        return 0


@torch.no_grad()
def pruned_copy(network: nn.Module, amount: float) -> nn.Module:
    """Zero the smallest weights of all layers."""
    network = copy.deepcopy(network)
    weights = list(select_parameters(network).values())
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = magnitudes.sort().values[min(int(amount * len(magnitudes)), len(magnitudes) - 1)]
    for weight in weights:
        weight.masked_fill_(weight.abs() < threshold, 0.0)
    return network


@torch.no_grad()
def clustered_copy(network: nn.Module, k: int) -> nn.Module:
    """Give the weights of each layer k values, and leave zeros zero, as the callback does."""
    network = copy.deepcopy(network)
    for weight in select_parameters(network).values():
        means = kmeans(weight, k, keep_zero=True)
        weight.copy_(means[assign(weight, means, keep_zero=True).long()])
    return network


def distance(network: nn.Module, other: nn.Module) -> float:
    """The sum of the squares of what all weights have lost."""
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    return sum(float((a - b).square().sum()) for a, b in pairs)
