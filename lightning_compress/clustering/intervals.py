"""Counts and sums of the values in intervals, for more values than fit into one sorted array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.floating[Any]]

_CHUNK = 2**24  # values sorted at a time
_CELLS = 2**14  # cells per chunk, at most
_BLOCK = 64  # values per stored sum; an interval adds whole blocks and sums only its two ends value by value


class Splittable(Protocol):
    """Values whose counts and sums can be taken by intervals."""

    def split(self, bounds: Floats) -> tuple[Floats, Floats]:
        """Return the count and the sum of the values in each of the len(bounds) + 1 intervals.

        A value that equals a bound belongs to the interval on its right. Each sum adds the interval's own values,
        because a difference of running sums would lose its digits to a single outlier.
        """


class Cells(NamedTuple):
    """Non-empty runs of the sorted values, in the order of their means; runs of different chunks may overlap.

    Attributes:
        means: The mean of each cell, ascending.
        counts: The number of values in each cell.
        totals: The sum of the values in each cell.
        low: The smallest of all values.
        high: The largest of all values.
    """

    means: Floats
    counts: Floats
    totals: Floats
    low: float
    high: float

    def split(self, bounds: Floats) -> tuple[Floats, Floats]:
        at = np.searchsorted(self.means, bounds)
        return segments(self.counts, at), segments(self.totals, at)


class Sorted:
    """Sorted values, with a stored sum for each block of 64."""

    def __init__(self, values: Floats) -> None:
        self.values = values
        n_blocks = len(values) // _BLOCK
        blocks = values[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).sum(axis=1, dtype=np.float64)
        self.blocks = np.append(blocks, 0.0)

    def split(self, bounds: Floats) -> tuple[Floats, Floats]:
        inner = np.searchsorted(self.values, _rounded_up(bounds, self.values.dtype))
        at = np.concatenate([[0], inner, [len(self.values)]])
        start, end = at[:-1], at[1:]
        first, last = -(-start // _BLOCK), end // _BLOCK  # the whole blocks inside
        totals = np.zeros(len(start))
        whole = first < last
        if whole.any():
            pairs = np.stack([first[whole], last[whole]], axis=1).ravel()
            totals[whole] = np.add.reduceat(self.blocks, pairs)[::2]
        head_end = np.minimum(first * _BLOCK, end)
        tail_start = np.maximum(last * _BLOCK, head_end)
        return np.diff(at).astype(np.float64), totals + self._sums(start, head_end) + self._sums(tail_start, end)

    def _sums(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> Floats:
        """Return the sums over intervals that are shorter than a block."""
        if len(self.values) == 0:
            return np.zeros(len(start))
        at = start[:, None] + np.arange(_BLOCK)
        inside = at < end[:, None]
        values = self.values[np.minimum(at, len(self.values) - 1)]
        sums: Floats = np.where(inside, values, 0.0).sum(axis=1, dtype=np.float64)
        return sums


class Data:
    """The values of all tensors, sorted one chunk at a time.

    Args:
        tensors: The tensors, of any shapes.
        names: Their names, for error messages.
        drop_zeros: Whether exact zeros are left out.

    Attributes:
        fits: Whether all values fit into one chunk, which is then sorted only once.
    """

    def __init__(self, tensors: Sequence[Tensor], names: Sequence[str], *, drop_zeros: bool) -> None:
        self._tensors, self._names, self._drop_zeros = tensors, names, drop_zeros
        self._dtype = np.float64 if any(one.dtype == torch.float64 for one in tensors) else np.float32
        self._size = sum(one.numel() for one in tensors)
        self.fits = self._size <= _CHUNK
        self._only: Sorted | None = None

    def split(self, bounds: Floats) -> tuple[Floats, Floats]:
        counts, totals = np.zeros(len(bounds) + 1), np.zeros(len(bounds) + 1)
        for chunk in self._chunks():
            count, total = chunk.split(bounds)
            counts += count
            totals += total
        return counts, totals

    def cells(self, edges: Floats | None = None) -> Cells:
        """Return the cells between `edges`; by default, edges are chosen for each chunk."""
        means, counts, totals, low, high = [], [], [], np.inf, -np.inf
        for chunk in self._chunks():
            if len(chunk.values) == 0:
                continue
            between = _edges(chunk.values) if edges is None else edges
            count, total = chunk.split(between)
            some = count > 0
            lower, upper = np.append(-np.inf, between)[some], np.append(between, np.inf)[some]
            means.append(np.clip(total[some] / count[some], lower, upper))  # rounding could put a mean outside its cell
            counts.append(count[some])
            totals.append(total[some])
            low, high = min(low, float(chunk.values[0])), max(high, float(chunk.values[-1]))
        if not means:
            return Cells(np.empty(0), np.empty(0), np.empty(0), 0.0, 0.0)
        mean = np.concatenate(means)
        order = np.argsort(mean, kind="stable")
        return Cells(mean[order], np.concatenate(counts)[order], np.concatenate(totals)[order], low, high)

    def distinct(self) -> Floats:
        """Return all distinct values, ascending."""
        found: Floats = np.empty(0, dtype=self._dtype)
        for chunk in self._chunks():
            found = np.unique(np.concatenate([found, _distinct(chunk.values)]))
        return found

    def _chunks(self) -> Iterator[Sorted]:
        if self._only is not None:
            yield self._only
            return
        buffer: Floats = np.empty(min(self._size, _CHUNK), dtype=self._dtype)
        filled, used = torch.from_numpy(buffer), 0
        for tensor in self._tensors:
            rest = tensor.detach().reshape(-1)
            while len(rest):
                room = len(buffer) - used
                filled[used : used + len(rest[:room])].copy_(rest[:room])
                used += len(rest[:room])
                rest = rest[room:]
                if used == len(buffer):
                    yield self._chunk(buffer)
                    used = 0
        if used or not len(buffer):
            yield self._chunk(buffer[:used])

    def _chunk(self, values: Floats) -> Sorted:
        chunk = Sorted(self._sorted(values))
        if self.fits:
            self._only = chunk
        return chunk

    def _sorted(self, values: Floats) -> Floats:
        values.sort()
        if len(values) and not (np.isfinite(values[0]) and np.isfinite(values[-1])):  # NaN sorts last
            found = [
                f"{int((~one.isfinite()).sum())} of {one.numel()} in {name}"
                for one, name in zip(self._tensors, self._names, strict=True)
                if not bool(one.isfinite().all())
            ]
            raise ValueError(
                f"Weights to cluster are NaN or infinite: {', '.join(found)}. They must be finite: check whether the "
                f"loss diverged."
            )
        if not self._drop_zeros:
            return values
        zero, after = np.searchsorted(values, 0.0), np.searchsorted(values, 0.0, side="right")
        kept = len(values) - (after - zero)
        values[zero:kept] = values[after:]
        return values[:kept]


def segments(values: Floats, at: NDArray[np.int64]) -> Floats:
    """Return the sums of the segments into which the ascending positions `at` cut the values."""
    start, end = np.append(0, at), np.append(at, len(values))
    sums, some = np.zeros(len(start)), start < end
    if some.any():
        sums[some] = np.add.reduceat(values, start[some])
    return sums


def _rounded_up(bounds: Floats, dtype: np.dtype[np.floating]) -> Floats:
    """Return the smallest number of this type at or above each bound, which compares with values as the bound does."""
    rounded = bounds.astype(dtype)
    return np.where(rounded < bounds, np.nextafter(rounded, np.asarray(np.inf, dtype=dtype)), rounded).astype(dtype)


def _distinct(ordered: Floats) -> Floats:
    first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def _edges(ordered: Floats) -> Floats:
    """Return the values at which new cells begin: all distinct values if these are few enough."""
    thin = _distinct(ordered[:: max(1, len(ordered) // 2**20)])
    if len(thin) <= _CELLS:
        thin = _distinct(ordered)
    if len(thin) > _CELLS:
        at = np.concatenate(
            [
                np.linspace(0, len(ordered) - 1, 4 * _CELLS).astype(np.int64),
                np.searchsorted(ordered, np.linspace(ordered[0], ordered[-1], 4 * _CELLS, dtype=ordered.dtype)),
            ]
        )
        probes = _distinct(np.sort(ordered[np.minimum(at, len(ordered) - 1)]))
        at = np.searchsorted(ordered, probes)
        end = np.append(at[1:], len(ordered))
        thin = probes[borders(probes, end - at, ordered[end - 1] - probes, _CELLS)]
    return thin.astype(np.float64)


def borders(ordered: Floats, count: Floats, width: Floats, n: int) -> NDArray[np.int64]:
    """Return the positions of at most n of the ascending values, the first included, at which new bins begin.

    One third of the positions divides the counts evenly, one third divides the distances evenly, and one third divides
    count^(1/3) width^(2/3) evenly, the density that optimal means approach (Panter and Dite 1951).

    Args:
        ordered: The ascending values.
        count: How many weights each value represents.
        width: The distance that each value covers.
        n: How many positions to return at most.
    """
    if len(ordered) <= n:
        return np.arange(len(ordered))
    span = ordered - ordered[0]
    density = np.cumsum(np.cbrt(count * width.astype(np.float64) ** 2))
    chosen = [
        np.searchsorted(curve, np.linspace(0, curve[-1], n // 3, endpoint=False))
        for curve in (np.cumsum(count, dtype=np.float64), span.astype(np.float64), density)
    ]
    return np.unique(np.concatenate([[0], *chosen]))
