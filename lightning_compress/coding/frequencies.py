"""Probabilities as integers, so that every machine computes the same ones.

A model of k symbols has k integer frequencies f_i >= 1 with the sum 2^24: symbol i costs 24 - log2(f_i) bits. A file
stores only levels l_i: 0 for a symbol that does not occur; otherwise f_i is proportional to 2^((l_i - 1) / r), where
the resolution r is the number of levels per factor of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import isqrt

import numpy as np

from lightning_compress.coding.packing import Array

PRECISION = 24  # bits, as constriction has them
TOTAL = 1 << PRECISION
RESOLUTIONS = (1, 2, 4, 8)  # a finer table makes the stream shorter and is longer itself
MAX_LEVEL = 1 + 8 * 48  # at the finest resolution, for counts below 2^48


def to_levels(counts: Array, resolution: int) -> Array:
    """Return the levels of symbols with the given counts.

    Example:
        >>> to_levels(np.array([1, 0, 2, 8]), 1).tolist()
        [1, 0, 2, 4]
    """
    used = counts > 0
    levels = np.zeros(len(counts), np.int64)
    levels[used] = 1 + np.rint(resolution * np.log2(counts[used] / counts[used].min()))
    return levels


def from_levels(levels: Sequence[int], resolution: int) -> Array:
    """Return the frequencies of levels, by integer arithmetic.

    Example:
        >>> from_levels([1, 0, 2, 4], 1).tolist(), 2**24
        ([1525202, 1, 3050403, 12201610], 16777216)
    """
    return normalised([_power(level, resolution) for level in levels])


def normalised(weights: Sequence[int]) -> Array:
    """Return frequencies in proportion to integer weights, at least 1 each; the largest gets the rounding remainder.

    Example:
        >>> normalised([3, 1]).tolist(), normalised([0, 0]).tolist()
        ([12582912, 4194304], [8388608, 8388608])
    """
    free, total = TOTAL - len(weights), sum(weights)
    if total == 0:
        weights, total = [1] * len(weights), len(weights)
    found = [1 + weight * free // total for weight in weights]
    found[max(range(len(weights)), key=weights.__getitem__)] += TOTAL - sum(found)
    return np.array(found, np.int64)


def of_groups(frequencies: Array, size: int) -> Array:
    """Return the frequencies of groups of `size` symbols; the first symbol of a group is the most significant digit.

    Example:
        >>> of_groups(np.array([3 << 22, 1 << 22]), 2).tolist()
        [9437184, 3145728, 3145728, 1048576]
    """
    single = [int(frequency) for frequency in frequencies]
    weights = single
    for _ in range(size - 1):
        weights = [a * b for a in weights for b in single]
    return normalised(weights)


def cost(counts: Array, frequencies: Array) -> float:
    """Return the bits that symbols with the given counts cost."""
    return float(counts @ (PRECISION - np.log2(frequencies)))


@cache
def _power(level: int, resolution: int) -> int:
    """Return 2^((level - 1) / resolution) in units of 2^-16, rounded down; 0 for level 0."""
    if level == 0:
        return 0
    whole, part = divmod(level - 1, resolution)
    root = 1 << (part * 8 // resolution + 16 * 8)  # its eighth root is 2^(part / resolution) 2^16
    for _ in range(3):
        root = isqrt(root)
    return root << whole
