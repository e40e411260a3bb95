"""The best partition of sorted bins into clusters, by dynamic programming.

The best clusters of numbers are intervals, so the best partition of sorted bins into k clusters is a shortest path. The
cost of an interval satisfies the quadrangle inequality: the best start of the last cluster never moves left when the
last bin moves right. Divide and conquer uses this (Gronlund et al. 2017, "Fast exact k-means, k-medians and Bregman
divergence clustering in 1D").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.clustering.intervals import Floats, segments


def best_partition(count: Floats, total: Floats, k: int) -> NDArray[np.int64]:
    """Return the k - 1 positions that cut bins into k clusters with the least sum of squares.

    The sum of squares of a cluster of n values with the sum s is a constant minus s^2 / n. Let D(j, i) be the least
    cost of the first i bins in j clusters: D(j, i) = min over t < i of D(j - 1, t) - s(t, i)^2 / n(t, i). The best t
    never falls as i grows. Each round therefore finds the best t halfway between those i whose best t is known.

    Args:
        count: The number of values in each bin; every bin holds at least one.
        total: The sum of the values in each bin.
        k: The number of clusters, at most the number of bins.
    """
    n = np.append(0.0, np.cumsum(count))
    s = np.append(0.0, np.cumsum(count * _narrow_wide_gaps(total / count, count, k)))
    m = len(count)
    cost = np.append(0.0, -(s[1:] ** 2) / n[1:])
    best = np.zeros((k + 1, m + 2), dtype=np.int32)
    for j in range(2, k + 1):
        at = best[j]
        at[j - 1], at[m + 1] = j - 1, m - 1
        improved = np.full(m + 1, np.inf)
        step = 1 << (m - j + 1).bit_length()
        while step > 1:
            step //= 2
            i = np.arange(j - 1 + step, m + 1, 2 * step)
            if len(i) == 0:
                continue
            low = np.maximum(at[i - step], j - 1)
            high = np.minimum(at[np.minimum(i + step, m + 1)], i - 1)
            lengths = high - low + 1
            starts = np.cumsum(lengths) - lengths
            t = np.arange(int(lengths.sum())) + np.repeat(low - starts, lengths)
            end = np.repeat(i, lengths)
            candidates = cost[t] - (s[end] - s[t]) ** 2 / (n[end] - n[t])
            least = np.minimum.reduceat(candidates, starts)
            ties = np.flatnonzero(candidates == np.repeat(least, lengths))
            at[i] = t[ties[np.searchsorted(ties, starts)]]
            improved[i] = least
        cost = improved
    cuts = [m]
    for j in range(k, 1, -1):
        cuts.append(int(best[j, cuts[-1]]))
    return np.array(cuts[:0:-1], dtype=np.int64)


def _narrow_wide_gaps(mean: Floats, count: Floats, k: int) -> Floats:
    """Return positions that have the same best partition as the means, without gaps so wide that precision is lost.

    A cluster that spans a gap g costs at least g^2 / 2. If some partition costs U, no cluster of the best partition
    spans a gap wider than sqrt(2 U), and wider gaps can be narrowed to sqrt(2 U). U here is the cost of the partition
    that cuts at the k - 1 widest gaps.
    """
    gaps = np.diff(mean)
    cuts = np.sort(np.argsort(gaps, kind="stable")[max(0, len(gaps) - k + 1) :]) + 1
    n = segments(count, cuts)
    lengths = np.diff(cuts, prepend=0, append=len(mean))
    start = np.repeat(mean[np.append(0, cuts)], lengths)
    offset = mean - start
    middle = np.repeat(segments(count * offset, cuts) / n, lengths)
    bound = np.sqrt(2.0 * (count * (offset - middle) ** 2).sum()) * (1 + 1e-9)
    bound = max(bound, 1e-6 * (mean[-1] - mean[0]))  # U may be 0, and this width is narrow enough
    position = np.append(0.0, np.cumsum(np.minimum(gaps, bound)))
    position -= (count * position).sum() / count.sum()
    return position / (np.abs(position).max() or 1.0)
