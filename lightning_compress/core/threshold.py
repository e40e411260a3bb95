"""Exact global pruning masks: which entries of many tensors are the smallest, in linear time and constant extra memory.

    tensors -> chunks -> integer keys in the scores' order -> histogram of the keys' first 16 bits -> the bin where the
    wanted rank falls -> histogram of that bin's next 16 bits -> ... -> the exact threshold -> masks, chunk by chunk

This is selection by the most significant digit (Knuth, The Art of Computer Programming 3, section 5.2.5). Ties, sorted
data and few distinct values cost neither memory nor exactness. A random sample that brackets the threshold (Floyd and
Rivest 1975, SELECT) was about a quarter faster on normal data, but needs a second method for the inputs that defeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK_BYTES = 2**23
_DIGIT_BITS = 16


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

    Entries are ordered by score; equal scores by position, the earlier tensor and within it the earlier row-major index
    first. So the masks are the same on every machine and device. Besides the masks (1 byte per entry) the function
    takes less than 100 MB, whatever the sizes.

    Args:
        scores: Tensors of any shapes and layouts, float16, bfloat16, float32 or float64. Infinities are ordinary
            values, and -0.0 equals 0.0.
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
    _check_count(scores, alive, n_drop)

    masks = [torch.ones(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    for mask, living in zip(masks, alive, strict=True):
        if living is not None:
            mask.copy_(living)
    dtype = torch.float64 if any(score.dtype == torch.float64 for score in scores) else torch.float32

    integer = torch.int32 if dtype == torch.float32 else torch.int64
    scratch = {score.device: torch.empty(0) for score in scores}
    for device in scratch:
        longest = max(score.numel() for score in scores if score.device == device)
        scratch[device] = torch.empty(min(longest, _CHUNK_BYTES // dtype.itemsize), dtype=integer, device=device)

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for score, mask, living in zip(scores, masks, alive, strict=True):
            start = 0
            for chunk in _chunks(score, _CHUNK_BYTES // dtype.itemsize):
                key = scratch[score.device][: len(chunk)]
                keep = mask.view(-1)[start : start + len(chunk)]
                _order_keys(chunk, absolute=absolute, out=key, dtype=dtype)
                if living is not None:
                    key.masked_fill_(~keep, torch.iinfo(key.dtype).min)  # below every score's key
                yield key, keep
                start += len(chunk)

    threshold, n_equal, n_drop_equal = _select(pieces, n_drop, bits=8 * dtype.itemsize)
    if n_drop_equal == n_equal:
        threshold, n_drop_equal = threshold + 1, 0
    for key, keep in pieces():
        torch.ge(key, threshold, out=keep)
        if n_drop_equal:
            equal = (key == threshold).nonzero().squeeze(1)[:n_drop_equal]
            keep[equal] = False
            n_drop_equal -= len(equal)
    return masks


def _select(pieces: Callable[[], Iterator[tuple[Tensor, Tensor]]], rank: int, *, bits: int) -> tuple[int, int, int]:
    """Return the `rank`-th smallest key, how many keys equal it, and how many of these are among the first `rank`."""
    low = -(1 << bits - 1)  # the key's bits that are known so far, the others zero
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
        prefix_shift = shift + _DIGIT_BITS
        for key, _ in pieces():
            if prefix_shift < bits:
                key = key[(key >> prefix_shift) == (low >> prefix_shift)]
            digit = key.bitwise_right_shift_(shift).sub_(low >> shift)
            counts += torch.bincount(digit, minlength=len(counts)).cpu()
        ranks = counts.cumsum(0)
        digit_of_rank = int(torch.searchsorted(ranks, rank))
        n_equal = int(counts[digit_of_rank])
        rank -= int(ranks[digit_of_rank]) - n_equal
        low += digit_of_rank << shift
    return low, n_equal, rank


def _order_keys(values: Tensor, *, absolute: bool, out, dtype) -> None:
    """Return integers that order as the values do: IEEE 754 stores a sign and a magnitude that orders as an integer."""
    floats = out.view(dtype)
    if absolute:
        torch.abs(values, out=floats)
    else:
        floats.copy_(values)
        sign = out >> 8 * dtype.itemsize - 1
        out.bitwise_and_(torch.iinfo(out.dtype).max).bitwise_xor_(sign).sub_(sign)


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


def _check_count(scores: Sequence[Tensor], alive: Sequence[Tensor | None], n_drop: int) -> None:
    total = sum(score.numel() for score in scores)
    dead = sum(int(living.numel() - living.count_nonzero()) for living in alive if living is not None)
    if not dead <= n_drop <= total:
        raise ValueError(
            f"n_drop={n_drop} must lie between the {dead} entries that alive already excludes and all {total} entries."
        )
