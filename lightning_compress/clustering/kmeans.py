"""One-dimensional k-means: the few values that approximate many weights best, in linear time and little memory.

1. One pass over the chunks stores the count and the sum of 16,384 cells per chunk. Cells are narrow where values are
   dense and where clusters are expected.
2. Dynamic programming finds the best partition of some thousand bins of cells, which is not a local optimum.
3. Lloyd's iterations, on the cells and then on the values, move the boundaries off the grid of bins.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_compress.clustering.intervals import Cells, Data, Floats, Splittable, borders, segments
from lightning_compress.clustering.partition import best_partition
from lightning_compress.core.keep_largest import chunk_size

Init = Literal["optimal", "linear", "density"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BINS, _WORK = 2**13, 2**20  # most bins, and most bins times clusters
_DP = 2**11  # most clusters for dynamic programming; more clusters begin at the density that optimal means approach
_LLOYD_CELLS, _LLOYD_DATA, _LLOYD_CHUNKS = 500, 100, 2  # most iterations; with many chunks each iteration sorts again
_TABLE = 2**14  # rows of the look-up table for nearest means


@torch.no_grad()
def kmeans(
    values: Tensor | Sequence[Tensor],
    n_clusters: int,
    *,
    init: Init = "optimal",
    keep_zero: bool = False,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the cluster means that approximate the values of one or several tensors best.

    The means c minimise E(c) = sum over values w of min over j of (w - c_j)^2. The minimum is exact if there are no
    more distinct values than bins (8192 for k <= 128, 4096 for k = 256). Otherwise E(c) exceeds it by a few millionths
    at k = 16 and by some ten-thousandths at k = 256. Nothing is random.

    Args:
        values: One tensor, or several that share the means: float16, bfloat16, float32 or float64, of any shapes.
        n_clusters: The number of means k, at least 1. If there are fewer distinct values, these are returned as the
            means, with a warning.
        init: How the means are initialised. "optimal" uses the optimal partition of the bins. "linear" spaces the means
            evenly from the smallest value to the largest, and "density" uses quantiles. From these two, Lloyd's
            iterations reach only a local optimum, and clusters that stay empty are dropped.
        keep_zero: Whether exact zeros, which pruning made, get a mean of their own. That mean is 0; it comes first,
            exists even if no value is zero, and is not counted in `n_clusters`.
        names: The names of the tensors, for messages.

    Returns:
        The means in ascending order (after the leading 0 of `keep_zero`), as float64 on the CPU.

    Raises:
        ValueError: A value is NaN or infinite, a dtype is none of those above, or `n_clusters` is below 1.

    References:
        Han et al. 2016, "Deep Compression", sections 3.1 and 3.2.

    Example:
        >>> kmeans(torch.tensor([1.0, 1.5, 0.0, 8.0, 0.0]), 2, keep_zero=True)
        tensor([0.0000, 1.2500, 8.0000], dtype=torch.float64)
    """
    tensors = [values] if isinstance(values, Tensor) else list(values)
    names = _names(len(tensors)) if names is None else list(names)
    _check(tensors, n_clusters, init, names)
    data = Data(tensors, names, drop_zeros=keep_zero)
    zero = [0.0] if keep_zero else []
    cells = data.cells()
    if len(cells.means) < n_clusters:
        distinct = data.distinct()  # a cell may hold several distinct values
        if len(distinct) <= n_clusters:
            if len(distinct) < n_clusters:
                warnings.warn(_too_few(n_clusters, len(distinct), names, keep_zero=keep_zero), stacklevel=3)
            return torch.tensor([*zero, *distinct.tolist()], dtype=torch.float64)
        cells = data.cells(distinct)
    means = _lloyd(cells, _start(cells, n_clusters, init), _LLOYD_CELLS)
    means = _lloyd(data, means, _LLOYD_DATA if data.fits else _LLOYD_CHUNKS)
    occupied = means[data.split(_midpoints(means))[0] > 0]
    return torch.tensor([*zero, *occupied.tolist()], dtype=torch.float64)


@torch.no_grad()
def assign(values: Tensor, means: Tensor, *, keep_zero: bool = False) -> Tensor:
    """Return for each value the index of the nearest mean: j(w) = argmin over j of (w - c_j)^2.

    Args:
        values: A tensor of any shape.
        means: The means in ascending order, after a leading 0 with `keep_zero`, as `kmeans` returns them.
        keep_zero: Whether index 0 is reserved for exact zeros: all zeros get it, and no other value does.

    Returns:
        Indices in the values' shape, on their device, in the smallest of uint8, int16 and int32 that holds them.

    Example:
        >>> assign(torch.tensor([[0.9, 0.0], [7.0, 0.1]]), torch.tensor([0.0, 1.25, 8.0]), keep_zero=True)
        tensor([[1, 0],
                [2, 1]], dtype=torch.uint8)
    """
    table = _Table(means[1:] if keep_zero else means, values.device)
    result = torch.empty(values.shape, dtype=index_dtype(len(means)), device=values.device)
    step = chunk_size(values.device)
    pairs = zip(torch.split(values.detach().reshape(-1), step), torch.split(result.view(-1), step), strict=True)
    for some, out in pairs:
        if keep_zero:
            out.copy_(torch.where(some == 0, 0, table.nearest(some) + 1))
        else:
            out.copy_(table.nearest(some))
    return result


def index_dtype(n: int) -> torch.dtype:
    """Return the smallest integer type that holds the indices of `n` entries and that torch can convert to int32."""
    return torch.uint8 if n <= 2**8 else torch.int16 if n <= 2**15 else torch.int32


class _Table:
    """Finds nearest means by a look-up table, ten times faster than a binary search with its mispredicted branches.

    Args:
        means: The means in ascending order.
        device: The device of the values.
    """

    def __init__(self, means: Tensor, device: torch.device) -> None:
        bounds = torch.from_numpy(_midpoints(means.double().cpu().numpy()))
        low, high = (float(bounds[0]), float(bounds[-1])) if len(bounds) else (0.0, 0.0)
        self.low, self.scale = low, (_TABLE - 4) / (high - low) if high > low else 0.0
        # Row r starts counting one row further left: rounding may put a value into the neighbouring row.
        rows = torch.arange(_TABLE + 3, dtype=torch.float64).sub_(2) / (self.scale or 1.0) + low
        n_left = torch.searchsorted(bounds, rows, right=True).int()
        self.steps = int((n_left[3:] - n_left[:-3]).max()) if self.scale else len(bounds)
        first = n_left[:_TABLE].clone() if self.scale else torch.zeros(_TABLE, dtype=torch.int32)
        self.first = first.to(device)
        self.bounds = torch.cat([bounds, torch.tensor([torch.inf], dtype=torch.float64)]).to(device)

    def nearest(self, values: Tensor) -> Tensor:
        exact = values.double()
        row = exact.sub(self.low).mul_(self.scale).add_(1.0).clamp_(0, _TABLE - 1).int()
        index = self.first.index_select(0, row)
        for _ in range(self.steps):
            index += exact >= self.bounds.index_select(0, index)
        return index


def _start(cells: Cells, k: int, init: Init) -> Floats:
    if init == "linear":
        return np.linspace(cells.low, cells.high, k)
    if init == "density":
        count = np.cumsum(cells.counts)
        return np.unique(cells.means[np.searchsorted(count, (np.arange(k) + 0.5) / k * count[-1])])
    gaps = np.diff(cells.means, prepend=cells.means[0], append=cells.means[-1])
    width = np.minimum(gaps[:-1], gaps[1:])
    if k > _DP:
        density = np.cumsum(np.cbrt(cells.counts * width**2))
        return np.unique(cells.means[np.searchsorted(density, (np.arange(k) + 0.5) / k * density[-1])])
    bins = borders(cells.means, cells.counts, width, max(3 * k, min(_BINS, _WORK // k)))[1:]
    count, total = segments(cells.counts, bins), segments(cells.totals, bins)
    cuts = best_partition(count, total, k)
    return segments(total, cuts) / segments(count, cuts)


def _lloyd(data: Splittable, means: Floats, iterations: int) -> Floats:
    """Move each mean to the mean of its cluster until none moves; the mean of an empty cluster stays."""
    for _ in range(iterations):
        count, total = data.split(_midpoints(means))
        moved = np.where(count > 0, total / np.maximum(count, 1.0), means)
        if np.array_equal(moved, means):
            break
        means = moved
    return means


def _midpoints(means: Floats) -> Floats:
    return (means[1:] + means[:-1]) / 2


def _names(n: int) -> list[str]:
    return ["values"] if n == 1 else [f"values[{index}]" for index in range(n)]


def check_init(init: str) -> None:
    """Raise a ValueError unless `init` is a known initialisation."""
    if init not in get_args(Init):
        raise ValueError(f"init must be 'optimal', 'linear' or 'density'; got {init!r}.")


def _too_few(n_clusters: int, n_distinct: int, names: Sequence[str], *, keep_zero: bool) -> str:
    if keep_zero and n_distinct == 0:
        return f"{', '.join(names)}: every entry is zero, so all of them count as pruned and stay zero."
    besides = " besides zero" if keep_zero else ""
    return (
        f"{', '.join(names)}: {n_clusters} clusters were asked for, but there are only {n_distinct} distinct "
        f"values{besides}; these are the codebook."
    )


def _check(tensors: Sequence[Tensor], n_clusters: int, init: str, names: Sequence[str]) -> None:
    assert len(tensors) == len(names), "every tensor needs a name"
    if n_clusters < 1:
        raise ValueError(f"n_clusters must be 1 or more; got {n_clusters!r} for {', '.join(names)}.")
    check_init(init)
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; k-means takes {', '.join(map(str, _DTYPES))}. Convert the tensor."
            )
