"""The best partition of sorted bins into clusters, by dynamic programming.

Clusters of numbers are intervals, so that the best partition into k of them is a shortest path, and its cost has the
quadrangle inequality: the best last boundary moves right with the end of the interval, which divide and conquer uses
(Gronlund et al. 2017, "Fast exact k-means, k-medians and Bregman divergence clustering in 1D").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_compress.clustering.intervals import Floats, segments


def best_partition(count: Floats, total: Floats, k: int) -> NDArray[np.int64]:
    """Return the k - 1 positions that cut bins into k clusters with the least sum of squares.

    Within a cluster with n values and the sum s the squares add up to a constant less s^2 / n. With D(j, i) the least
    cost of the first i bins in j clusters, D(j, i) = min over t < i of D(j - 1, t) - s(t, i)^2 / n(t, i), and the best
    t does not fall as i grows: every round halves the distance between the i whose t is known.
    """
    n = np.append(0.0, np.cumsum(count))
    s = np.append(0.0, np.cumsum(count * _drawn_together(total / count, count, k)))
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


def _drawn_together(mean: Floats, count: Floats, k: int) -> Floats:
    """Return positions with the same best partition and without the far outliers that would cost all precision.

    A cluster over a gap g costs at least g^2 / 2. So no best partition has one over a gap of more than sqrt(2 U), where
    U is the cost of any partition, and every such gap can be narrowed to that. U cuts the widest gaps.
    """
    gaps = np.diff(mean)
    cuts = np.sort(np.argsort(gaps, kind="stable")[max(0, len(gaps) - k + 1) :]) + 1
    n = segments(count, cuts)
    lengths = np.diff(cuts, prepend=0, append=len(mean))
    start = np.repeat(mean[np.append(0, cuts)], lengths)
    offset = mean - start
    middle = np.repeat(segments(count * offset, cuts) / n, lengths)
    bound = np.sqrt(2.0 * (count * (offset - middle) ** 2).sum()) * (1 + 1e-9)
    bound = max(bound, 1e-6 * (mean[-1] - mean[0]))  # which costs no precision; U may be 0
    position = np.append(0.0, np.cumsum(np.minimum(gaps, bound)))
    position -= (count * position).sum() / count.sum()
    return position / (np.abs(position).max() or 1.0)
