"""K-means on numbers: the best few values for many weights, in linear time and little memory.

one pass, chunk by chunk    -> 16,384 cells each, narrow where values are many or clusters will be: count and sum
dynamic programming         -> the best partition of some thousand bins of cells: no local optimum, no luck
Lloyd on cells, then data   -> boundaries leave the grid of the bins
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
_BINS, _WORK = 2**13, 2**20  # at most so many bins; fewer where bins times clusters is more than the work
_DP = 2**11  # clusters; more begin at the density that the optimum tends to
_LLOYD_CELLS, _LLOYD_DATA, _LLOYD_CHUNKS = 500, 100, 2  # iterations at most; over many chunks each sorts them anew
_TABLE = 2**14


@torch.no_grad()
def kmeans(
    values: Tensor | Sequence[Tensor],
    n_clusters: int,
    *,
    init: Init = "optimal",
    keep_zero: bool = False,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the cluster means that stand best for the values of one or several tensors together.

    They minimise E(c) = sum over values w of min over j of (w - c_j)^2: exactly where there are no more distinct values
    than bins (8192 for k <= 128, 4096 for k = 256), else to a few millionths at k = 16 and some ten-thousandths at
    k = 256. No draw is random.

    Args:
        values: One tensor, or several that share the means: float16, bfloat16, float32 or float64, of any shapes.
        n_clusters: How many means, k >= 1. Where there are fewer distinct values, these are the means, with a warning.
        init: "optimal" begins at the optimum. "linear" begins with means evenly from the smallest value to the largest,
            "density" with quantiles; Lloyd's iterations lead both to a local optimum, and clusters that stay empty are
            left out.
        keep_zero: Exact zeros, which pruning has made, have a mean of their own, 0, which is the first and not counted
            in `n_clusters`; it is there without zeros too.
        names: What error messages call the tensors.

    Returns:
        The means, ascending but for the leading zero of `keep_zero`, float64, on the CPU.

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
        distinct = data.distinct()  # cells hold more than one value each where very many clusters are asked for
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
        means: Ascending; with `keep_zero` after a leading 0, as `kmeans` returns them.
        keep_zero: Zeros, and only they, get index 0.

    Returns:
        Indices in the values' shape and on their device, uint8, int16 or int32, whichever is enough.

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
    """Return the smallest type that holds the indices of `n` entries and that torch can index with or widen."""
    return torch.uint8 if n <= 2**8 else torch.int16 if n <= 2**15 else torch.int32


class _Table:
    """Nearest means by a look-up: a search for every value costs ten times as much, in mispredicted branches."""

    def __init__(self, means: Tensor, device: torch.device) -> None:
        bounds = torch.from_numpy(_midpoints(means.double().cpu().numpy()))
        low, high = (float(bounds[0]), float(bounds[-1])) if len(bounds) else (0.0, 0.0)
        self.low, self.scale = low, (_TABLE - 4) / (high - low) if high > low else 0.0
        # Row r counts from one row further left, so that a value that rounding puts into a neighbouring row is right.
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
    """Move means to the means of their clusters until none moves; one without values stays."""
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
    """Raise a ValueError unless `init` says where the k-means begins."""
    if init not in get_args(Init):
        raise ValueError(f"init must be 'optimal', 'linear' or 'density'; got {init!r}.")


def _too_few(n_clusters: int, n_distinct: int, names: Sequence[str], *, keep_zero: bool) -> str:
    if keep_zero and n_distinct == 0:
        return f"{', '.join(names)}: every entry is zero, which counts as pruned and stays."
    of = " besides zero" if keep_zero else ""
    return (
        f"{', '.join(names)}: {n_clusters} clusters for {n_distinct} distinct values{of}; these are used as they are."
    )


def _check(tensors: Sequence[Tensor], n_clusters: int, init: str, names: Sequence[str]) -> None:
    assert len(tensors) == len(names), "a name for each tensor"
    if n_clusters < 1:
        raise ValueError(f"n_clusters must be 1 or more; got {n_clusters!r} for {', '.join(names)}.")
    check_init(init)
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: values must be one of {', '.join(map(str, _DTYPES))}.")
