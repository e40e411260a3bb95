"""Exact global pruning masks: which entries of many tensors are the smallest, in linear time and little extra memory.

    a small sample                 -> two cuts, low and high, with the wanted rank between them
    one pass, chunk by chunk       -> score >= high: kept;  score < low: dropped;  between: collected (about 1 %)
    the same for what was collected, until it is small enough to sort

This is the selection algorithm of Floyd and Rivest (1975, "Expected time bounds for selection"), with one addition:
the cuts are pairs (score, position). No two pairs are equal, so equal scores need no case of their own, and constant,
sorted or mostly zero inputs are cut as evenly as any other. The sample decides how long it takes, never the result.
Selection by histograms of the scores' bits, which needs no sample, took 1.6 times as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Entries that are processed at a time. On a CPU, torch runs operators of this size in the calling thread: the barriers
# of parallel operators cost much of the time that they save, and many times more on a busy machine. Elsewhere, so many
# entries hide the cost of a kernel launch.
_CHUNK_CPU, _CHUNK_ELSEWHERE = 2**15, 2**22
_SORTABLE = 4096  # entries: sorting so few takes less time than one more round
_SPREAD = 3.0  # standard deviations from the wanted rank to either cut: 3 rounds in 1000 have to be repeated


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
    first. So the masks are the same on every machine and device. They take a byte per entry; finding them takes some
    30 MB more for 100 million entries, 200 MB more for a billion.

    Args:
        scores: Tensors of any shapes and layouts on one device, float16, bfloat16, float32 or float64. Infinities are
            ordinary values, and -0.0 equals 0.0.
        n_drop: Number of entries to drop, at least the number that `alive` excludes, at most all of them.
        absolute: Order by absolute value, so that weights can be given as they are.
        alive: For each tensor a boolean mask of its shape, or None. Entries that are False there come before every
            score: they are dropped, and count in `n_drop`.
        names: Names of the tensors, for error messages.

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
    assert len(scores) == len(alive) == len(names), "one entry of alive and of names for each tensor"
    _check(scores, alive, names)
    n_total = sum(score.numel() for score in scores)
    n_alive = n_total - sum(int(living.numel() - living.count_nonzero()) for living in alive if living is not None)
    if not n_total - n_alive <= n_drop <= n_total:
        raise ValueError(
            f"n_drop={n_drop} must lie between the {n_total - n_alive} entries that alive excludes already and all "
            f"{n_total} entries."
        )

    masks = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    if n_total > 0:
        _write_masks(_parts(scores, alive, masks), n_total - n_drop, n_alive, absolute=absolute)
    return masks


class _Part(NamedTuple):
    """One tensor, its mask, and its position among the tensors."""

    score: Tensor
    alive: Tensor | None  # flat
    keep: Tensor  # flat, to be written
    start: int  # position of the first entry, counted over all the tensors


class _Cut(NamedTuple):
    score: float
    position: int


class _Between(NamedTuple):
    """The undecided entries of one part: those between the two cuts."""

    score: Tensor
    at: Tensor  # indices into the part


def _parts(scores: Sequence[Tensor], alive: Sequence[Tensor | None], masks: Sequence[Tensor]) -> list[_Part]:
    parts, start = [], 0
    for score, living, mask in zip(scores, alive, masks, strict=True):
        parts.append(_Part(score, None if living is None else living.reshape(-1), mask.view(-1), start))
        start += score.numel()
    return parts


def _write_masks(parts: Sequence[_Part], n_keep: int, n_alive: int, *, absolute: bool) -> None:
    """Set `keep` to True at the `n_keep` largest of the living entries, and to False elsewhere."""
    n_total = parts[-1].start + parts[-1].score.numel()
    ranked, positions = _sample(parts, n_total, absolute=absolute)
    spread = _SPREAD
    while True:
        low, high = _cuts(ranked, positions, n_keep / max(n_alive, 1), spread)
        n_above, between = _split(parts, low, high, absolute=absolute)
        score = torch.cat([some.score for some in between])
        if n_above <= n_keep <= n_above + len(score):
            break
        spread *= 2  # the widest bracket leaves all living entries undecided, so that this loop ends

    n_drop = n_above + len(score) - n_keep
    if len(score) <= _SORTABLE or len(score) > n_total // 2:  # the second: this sample has hardly narrowed the search
        survives = torch.zeros_like(score, dtype=torch.bool)
        survives[_order(score)[n_drop:]] = True
    else:
        (survives,) = keep_largest([score], n_drop)
    for part, some, survivors in zip(parts, between, torch.split(survives, [len(b.at) for b in between]), strict=True):
        part.keep[some.at] = survivors


def _sample(parts: Sequence[_Part], n_total: int, *, absolute: bool) -> tuple[Tensor, Tensor]:
    """Return the sorted scores, and the positions, of one random living entry in each of N^(2/3) / 2 equal stretches.

    A stretch whose entry is dead adds none, and few entries, which need no cuts, get an empty sample.
    """
    size = int(n_total ** (2 / 3)) // 2 if n_total > _SORTABLE else 0
    jitter = torch.rand(size, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0))
    drawn = torch.arange(size, device="cpu").add(jitter).mul_(n_total / max(size, 1)).long().clamp_(max=n_total - 1)
    borders = torch.searchsorted(drawn, torch.tensor([part.start for part in parts[1:]], device="cpu"))
    scores, positions = [], []
    for part, positions_here in zip(parts, drawn.tensor_split(borders), strict=True):
        index = (positions_here - part.start).to(part.score.device)
        if part.alive is not None:
            index = index[part.alive[index]]
        scores.append(part.score.take(index))
        positions.append(index + part.start)
    score = torch.cat(scores)  # of the dtype that holds them all
    order = _order(score.abs_() if absolute else score)
    return score[order], torch.cat(positions)[order]


def _order(score: Tensor) -> Tensor:
    return torch.argsort(score + 0.0, stable=True)  # -0.0 + 0.0 is 0.0: a radix sort would order -0.0 before 0.0


def _cuts(ranked: Tensor, positions: Tensor, fraction_kept: float, spread: float) -> tuple[_Cut, _Cut]:
    """Return two cuts of which the first keeps more than the fraction and the second less, by all likelihood."""
    size = len(ranked)
    margin = 1 + spread * math.sqrt(size * fraction_kept * (1 - fraction_kept))
    low, high = math.floor(size * (1 - fraction_kept) - margin), math.ceil(size * (1 - fraction_kept) + margin)
    return (
        _Cut(float(ranked[low]), int(positions[low])) if low >= 0 else _Cut(-math.inf, 0),
        _Cut(float(ranked[high]), int(positions[high])) if high < size else _Cut(math.inf, 2**63),
    )


def _split(parts: Sequence[_Part], low: _Cut, high: _Cut, *, absolute: bool) -> tuple[int, list[_Between]]:
    """Write `keep`, True for entries of at least `high`; return their number, and the entries between the cuts."""
    device = parts[0].keep.device
    dtype = torch.float64 if any(part.score.dtype == torch.float64 for part in parts) else torch.float32
    size = min(chunk_size(device), max(part.keep.numel() for part in parts))
    all_scores, all_above = torch.empty(size, dtype=dtype, device=device), torch.empty(size, dtype=dtype, device=device)
    all_open = torch.empty(size, dtype=torch.bool, device=device)
    n_above, between = 0, []
    for part in parts:
        scores, indices, start = [], [], 0
        for chunk in _chunks(part.score):
            n = chunk.numel()
            score, above, undecided = all_scores[:n], all_above[:n], all_open[:n]
            keep = part.keep[start : start + n]
            score.view(chunk.shape).copy_(chunk)
            if absolute:
                score.abs_()
            keep.copy_(_at_least(high, score, part.start + start, out=above))
            undecided.copy_(_at_least(low, score, part.start + start, out=above))
            undecided.bitwise_xor_(keep)  # what is at least high is at least low
            if part.alive is not None:
                keep.bitwise_and_(part.alive[start : start + n])
                undecided.bitwise_and_(part.alive[start : start + n])
            n_above += int(keep.count_nonzero())
            at = undecided.nonzero().squeeze(1)
            scores.append(score[at])
            indices.append(at.add_(start))
            start += n
        between.append(_Between(torch.cat(scores), torch.cat(indices)))
    return n_above, between


def _at_least(cut: _Cut, score: Tensor, start: int, *, out: Tensor) -> Tensor:
    """Write 1 where (score, position) >= cut and 0 elsewhere, for entries whose positions count up from `start`.

    Torch compares floats several times faster into floats, and copies them into a mask, than directly into a mask.
    """
    before = cut.position - start
    if before >= len(score):
        return torch.gt(score, cut.score, out=out)
    torch.ge(score, cut.score, out=out)
    if before > 0:
        torch.gt(score[:before], cut.score, out=out[:before])
    return out


def chunk_size(device: torch.device) -> int:
    """Return the number of entries to process at a time."""
    return _CHUNK_CPU if device.type == "cpu" else _CHUNK_ELSEWHERE


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of some of the entries each, one after the other in row-major order."""
    size = chunk_size(tensor.device)
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), size)
    elif tensor.numel() <= size:
        yield tensor
    elif len(tensor) == 1:
        yield from _chunks(tensor[0])
    else:
        for rows in torch.split(tensor, max(1, size * len(tensor) // tensor.numel())):
            yield from _chunks(rows)


def _check(scores: Sequence[Tensor], alive: Sequence[Tensor | None], names: Sequence[str]) -> None:
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
        if score.numel() > 0 and any(bool(chunk.amax().isnan()) for chunk in _chunks(score))  # amax passes a NaN on
    ]
    if found:
        raise ValueError(f"Scores are NaN: {', '.join(found)}. Look for a diverged loss or gradient, or an empty mean.")
