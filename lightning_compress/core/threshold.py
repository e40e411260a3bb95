"""Exact global pruning masks: which entries of many tensors are the smallest, in linear time and little extra memory.

    a sample of the scores -> two cuts, low and high, with the wanted one between them
    one pass, chunk by chunk -> at least high: kept        below low: dropped        between: collected, about 1 %
    the same again on what was collected, until it is small enough to sort

This is the selection algorithm of Floyd and Rivest (1975, Expected time bounds for selection, section 2), on pairs
(score, position). Pairs are all different, so equal scores need no case of their own: sorted, constant or mostly zero
inputs are split as well as any other. The sample decides only how long it takes, never the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 2**19  # entries; what is computed from a chunk stays in the cache
_SORTABLE = 2048  # entries; fewer are sorted, which is then faster than one more round
_SPREAD = 4.0  # standard deviations from the wanted rank to either cut: one call in 10^4 needs a second pass


class _Cut(NamedTuple):
    score: float
    position: int  # in all the tensors, one after the other, each in row-major order


@torch.no_grad()
def keep_largest(
    scores: Sequence[Tensor],
    n_drop: int,
    *,
    absolute: bool = False,
    alive: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Return boolean masks that are False at exactly the `n_drop` smallest scores of all the tensors together.

    Equal scores are ordered by position: the earlier tensor, and within it the earlier row-major index, is dropped
    first. So the masks are the same on every machine and device. For N entries the masks take N bytes, and the work
    takes a few MB plus about 80 N^(2/3) bytes (20 MB for 100 million entries, 90 MB for a billion).

    Args:
        scores: Tensors on one device, of any shapes and layouts, float16, bfloat16, float32 or float64. Infinities are
            ordinary values, and -0.0 equals 0.0.
        n_drop: Number of entries to drop, at least the number that `alive` excludes, at most all of them.
        absolute: Order by absolute value, so that weights can be given as they are.
        alive: For each tensor a boolean mask of its shape, or None. Entries that are False there come before every
            score: they are dropped, and count in `n_drop`.
        names: What error messages call the tensors.

    Returns:
        One mask per tensor, of its shape and on its device, contiguous. True: kept.

    Raises:
        ValueError: A score is NaN, a dtype is none of those above, `alive` does not fit, or `n_drop` is out of range.

    Example:
        >>> keep_largest([torch.tensor([0.3, -0.9]), torch.tensor([-0.1, 0.5])], 2, absolute=True)
        [tensor([False,  True]), tensor([False,  True])]
    """
    alive = [None] * len(scores) if alive is None else alive
    names = [f"scores[{index}]" for index in range(len(scores))] if names is None else names
    assert len(scores) == len(alive) == len(names), "one entry of alive and names for each tensor"
    _check_scores(scores, alive, names)
    n_total = sum(score.numel() for score in scores)
    n_alive = n_total - sum(int(living.logical_not().sum()) for living in alive if living is not None)
    if not n_total - n_alive <= n_drop <= n_total:
        raise ValueError(
            f"n_drop={n_drop} must lie between the {n_total - n_alive} entries that alive excludes already and all "
            f"{n_total} entries."
        )
    if n_total == 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]

    n_keep = n_total - n_drop
    masks = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    ranked, positions = _sample(scores, alive, absolute=absolute)
    spread = _SPREAD
    while True:
        low, high = _cuts(ranked, positions, 1 - n_keep / max(n_alive, 1), spread)
        n_above, undecided, open = _split(scores, alive, masks, low, high, absolute=absolute)
        if 0 <= n_keep - n_above <= len(open):
            break
        spread *= 2

    n_drop_open = len(open) - (n_keep - n_above)
    if len(open) <= _SORTABLE:
        survives = torch.zeros_like(open, dtype=torch.bool)
        survives[open.sort(stable=True).indices[n_drop_open:]] = True
    else:
        (survives,) = keep_largest([open], n_drop_open)
    for (keep, at), survivor in zip(undecided, survives.split([len(at) for _, at in undecided]), strict=True):
        keep[at] = survivor
    return masks


def _sample(scores, alive, *, absolute):
    """sorted sample"""
    n_total = sum(score.numel() for score in scores)
    size = int(n_total ** (2 / 3)) if n_total > _SORTABLE else 0
    generator = torch.Generator().manual_seed(0)
    jitter = torch.rand(size, dtype=torch.float64, generator=generator)
    positions = (torch.arange(size, dtype=torch.float64) + jitter).mul_(n_total / max(size, 1)).long()
    positions = positions.clamp_(max=n_total - 1).to(scores[0].device)
    values, kept = [], []
    start = 0
    dtype = reduce(torch.promote_types, (score.dtype for score in scores))
    for score, living in zip(scores, alive, strict=True):
        first, last = torch.searchsorted(positions, torch.tensor([start, start + score.numel()], device=positions.device)).tolist()
        at = positions[first:last]
        if living is not None:
            at = at[living.take(at - start)]
        values.append(score.take(at - start).to(dtype))
        kept.append(at)
        start += score.numel()
    sample = torch.cat(values)
    sample = sample.abs_() if absolute else sample.add_(0.0)
    ranked, order = sample.sort(stable=True)
    return ranked, torch.cat(kept)[order]


def _cuts(ranked, positions, fraction, spread):
    n = len(ranked)
    margin = spread * math.sqrt(n * fraction * (1 - fraction)) + 1
    lower, upper = math.floor(n * fraction - margin), math.ceil(n * fraction + margin)
    low = _Cut(float(ranked[lower]), int(positions[lower])) if lower >= 0 else _Cut(-math.inf, 0)
    high = _Cut(float(ranked[upper]), int(positions[upper])) if upper < n else _Cut(math.inf, 2**62)
    return low, high


def _split(scores, alive, masks, low, high, *, absolute):
    size = min(_CHUNK, max(score.numel() for score in scores))
    dtype = reduce(torch.promote_types, (score.dtype for score in scores))
    magnitudes = torch.empty(size if absolute else 0, dtype=dtype, device=scores[0].device)
    between = torch.empty(size, dtype=torch.bool, device=scores[0].device)
    n_above, undecided, values, position = 0, [], [], 0
    for score, living, mask in zip(scores, alive, masks, strict=True):
        start = position
        for chunk in _chunks(score, _CHUNK):
            n = len(chunk)
            here = slice(position - start, position - start + n)
            x = torch.abs(chunk, out=magnitudes[:n]) if absolute else chunk.to(dtype)
            keep, undec = mask.view(-1)[here], between[:n]
            _at_least(x, position, high, out=keep)
            _at_least(x, position, low, out=undec)
            undec.bitwise_xor_(keep)
            if living is not None:
                undec &= living.reshape(-1)[here]
                keep &= living.reshape(-1)[here]
            at = undec.nonzero().squeeze(1)
            n_above += int(keep.count_nonzero())
            undecided.append((keep, at))
            values.append(x[at])
            position += n
    return n_above, undecided, torch.cat(values)


def _at_least(scores: Tensor, position: int, cut: _Cut, *, out: Tensor) -> None:
    """Write where (score, position) >= cut, for a chunk whose first entry stands at `position`."""
    before = min(max(cut.position - position, 0), len(scores))
    torch.gt(scores[:before], cut.score, out=out[:before])
    torch.ge(scores[before:], cut.score, out=out[before:])


def _chunks(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the flat tensor in row-major order, at most `size` entries at a time, and copy no more than these."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(size)
    elif tensor.numel() <= size:
        yield tensor.reshape(-1)
    elif len(tensor) == 1:
        yield from _chunks(tensor[0], size)
    else:
        for rows in tensor.split(max(1, size * len(tensor) // tensor.numel())):
            yield from _chunks(rows, size)


def _check_scores(scores: Sequence[Tensor], alive: Sequence[Tensor | None], names: Sequence[str]) -> None:
    for score, living, name in zip(scores, alive, names, strict=True):
        if score.dtype not in _DTYPES:
            raise ValueError(f"{name} is {score.dtype}: scores must be one of {', '.join(map(str, _DTYPES))}.")
        if living is not None and (living.shape != score.shape or living.dtype != torch.bool):
            raise ValueError(
                f"alive for {name} is {living.dtype} of shape {tuple(living.shape)}: it must be torch.bool of the "
                f"scores' shape {tuple(score.shape)}."
            )
    found = [
        f"{int(score.isnan().sum())} of {score.numel()} in {name}"
        for score, name in zip(scores, names, strict=True)
        if score.numel() and score.max().isnan()  # max passes a NaN on and, unlike isnan, allocates nothing
    ]
    if found:
        raise ValueError(f"Scores are NaN: {', '.join(found)}. Look for a diverged loss or gradient, or an empty mean.")
