"""The encoding of quantized weights: small integers times a scale, one for all entries or one per channel.

    entry i is q_i * scale[channel of i], multiplied by torch in the tensor's dtype; q_i is least, least + step, ...

Signs with a scale, as in XNOR-Net, are the grid of -1 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_compress.coding.encodings.plain import read_plain, write_plain
from lightning_compress.coding.packing import Array
from lightning_compress.coding.patterns import Words
from lightning_compress.coding.streams import MAX_SYMBOLS, Reader, Writer

SCALED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST = MAX_SYMBOLS // 2 - 1
_LIKELY = (1, 127, 128, 7, 8, 15, 3)  # likely integers of a channel's largest magnitude
_POSSIBLE = tuple(range(1, 129))  # all integers of a channel's largest magnitude that are tried
_ULPS = (0, 1, -1, 2, -2)  # distances of a scale from a quotient, in units in the last place
_ROUNDS = ((_LIKELY, 16), (_POSSIBLE, 64))  # integers to try, and the number of entries on which they are tried first
_FEW = 4  # entries of a channel that suffice to exclude most scales
_PROBED = 16  # most channels for which a quick test comes first
_CHANNELS = 64  # channels that are solved together
_AT_ONCE = 1 << 18  # entries that are solved together


@dataclass(frozen=True)
class Grid:
    """The scale of each channel, and the integer of each entry, as `find_grid` returns them."""

    scales: Words
    integers: Array


def find_grid(words: Words, dtype: torch.dtype, starts: Array) -> Grid | None:
    """Return the grid that reproduces all values bit for bit, or None if none is found.

    Each scale is searched among the values that symmetric quantization produces: the least nonzero magnitude of the
    channel over 1, 2 or 3, or its largest magnitude over 1 to 128, up to two units in the last place away.

    Args:
        words: The bit patterns of the values, channel after channel.
        dtype: The dtype of the values, one of `SCALED`.
        starts: The position at which each channel starts; no channel is empty.

    Example:
        >>> from lightning_compress.coding.patterns import to_words
        >>> weight = torch.tensor([-3.0, 1.0, 2.0]) * torch.tensor(0.1)
        >>> find_grid(to_words(weight), torch.float32, np.array([0])).integers.tolist()
        [-3, 1, 2]
    """
    scales, integers = [], []
    ends = np.append(starts[1:], len(words))
    first = 0
    while first < len(starts):  # the first channels suffice to exclude most tensors without a grid
        last = first + 4 if first == 0 else int(np.searchsorted(ends, starts[first] + _AT_ONCE, side="right"))
        last = min(max(first + 1, last), len(starts))
        block = words[starts[first] : ends[last - 1]]
        lengths = (ends - starts)[first:last]
        found = _solve(block, dtype, starts[first:last] - starts[first], lengths)
        if found is None:
            return None
        owner = torch.from_numpy(np.repeat(np.arange(last - first), lengths))
        integers.append(_integers(_values(block, dtype), found[owner]).to(torch.int32).numpy())
        scales.append(found.view(torch.uint8).numpy().view(words.dtype))
        first = last
    return Grid(np.concatenate(scales), np.concatenate(integers))


def write_grid(writer: Writer, grid: Grid, dtype: torch.dtype) -> int:
    """Write the scales and the integers; return the number of points of the grid."""
    least, step, size = _levels(grid.integers)
    writer.signed(least)
    writer.number(step - 1)
    writer.number(size - 1)
    write_plain(writer, grid.scales, dtype, half=False)
    writer.coded(((grid.integers - least) // step).astype(np.uint8 if size <= 256 else np.uint16), size)
    return size


def read_grid(
    reader: Reader, count: int, dtype: torch.dtype, kind: np.dtype[np.generic], channels: int
) -> tuple[Words, int, Iterator[Array]]:
    """Read what `write_grid` wrote; return the scales, the number of points, and an iterator over the integers."""
    least, step = reader.signed(), 1 + reader.number(2 * _LARGEST + 1)
    size = 1 + reader.number(MAX_SYMBOLS)
    if not -_LARGEST <= least <= least + step * (size - 1) <= _LARGEST:
        reader.fail(f"its grid goes from {least} to {least + step * (size - 1)}, beyond +-{_LARGEST}")
    scales = np.concatenate([np.empty(0, kind), *read_plain(reader, channels, dtype, kind)[1]])
    return scales, size, reader.coded(count, least + step * np.arange(size, dtype=np.int32))


def scaled(integers: Array, scales: Words, dtype: torch.dtype) -> Words:
    """Return the bit patterns of integers times scales: one scale per integer, or one for all."""
    product = torch.from_numpy(integers).to(dtype) * _values(scales, dtype)
    return product.view(torch.uint8).numpy().view(scales.dtype)


def _values(words: Words, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.uint8)).view(dtype)


def _integers(values: Tensor, scales: Tensor) -> Tensor:
    return torch.round(values.double() / scales.double()).nan_to_num_(0, 0, 0)


def _levels(integers: Array) -> tuple[int, int, int]:
    least, most = int(integers.min()), int(integers.max())
    step = int(np.gcd.reduce(np.unique(integers - least))) or 1
    return least, step, (most - least) // step + 1


def _solve(words: Words, dtype: torch.dtype, starts: Array, lengths: Array) -> Tensor | None:
    """Return the scale of each channel, or None if a channel has none."""
    magnitudes = _magnitudes(words, dtype)
    tops = np.maximum.reduceat(magnitudes, starts)
    if not np.isfinite(tops).all():  # the maximum of values with a NaN is NaN
        return None
    bottoms = np.minimum.reduceat(np.where(magnitudes > 0, magnitudes, np.inf), starts)
    if len(starts) <= _PROBED and not _promising(magnitudes, starts, lengths, bottoms, tops, dtype):
        return None
    values, least, largest = _values(words, dtype), torch.from_numpy(bottoms), torch.from_numpy(tops)
    owner = torch.from_numpy(np.repeat(np.arange(len(starts)), lengths))
    scales = torch.zeros(len(starts), dtype=dtype)
    unsolved = largest > 0
    for integers, probed in _ROUNDS:
        places = torch.from_numpy(starts[:, None] + np.arange(probed) % lengths[:, None])
        for some in torch.split(torch.nonzero(unsolved)[:, 0], _CHANNELS):
            candidates = _candidates(least[some], largest[some], integers, dtype)
            probes = values[places[some]]
            fits = _exact(probes[:, None, :_FEW], candidates[:, :, None]).all(2)
            left = fits.any(0).nonzero()[:, 0]
            fits[:, left] &= _exact(probes[:, None, :], candidates[:, left, None]).all(2)
            scales[some] = candidates.gather(1, fits.byte().argmax(1, keepdim=True))[:, 0]  # the first scale that fits
        unsolved = torch.zeros(len(starts), dtype=torch.bool)
        unsolved[owner[~_exact(values, scales[owner])]] = True
        if not unsolved.any():
            return scales
    return None


def _magnitudes(words: Words, dtype: torch.dtype) -> Array:
    if dtype == torch.bfloat16:  # numpy does not have this dtype
        return _values(words, dtype).abs().double().numpy()
    with np.errstate(invalid="ignore"):  # signalling NaNs
        found: Array = np.abs(words.view(f"f{dtype.itemsize}")).astype(np.float64)
    return found


def _promising(
    magnitudes: Array, starts: Array, lengths: Array, least: Array, largest: Array, dtype: torch.dtype
) -> bool:
    """Return whether the first entries of each channel are, up to rounding, multiples of one of the scales to be tried.

    Let s be a scale before rounding, v a value and r = v / s. If fl(q s') = v for an s' at most two units in the last
    place from fl(s), and nothing is subnormal, then |q - r| <= 3.1 eps r. So no scale fits a channel that has no s with
    |q - r| <= 8 eps r.
    """
    used = largest > 0
    info = torch.finfo(dtype)
    if not used.any() or least[used].min() / 128 < 4 * info.tiny:
        return True
    places = starts[used, None] + np.arange(8) % lengths[used, None]
    scales = np.concatenate([least[used, None] / [1, 2, 3], largest[used, None] / _POSSIBLE], 1)
    ratios = magnitudes[places][:, None, :] / scales[:, :, None]
    fits = (np.abs(ratios - np.rint(ratios)) <= 8 * info.eps * ratios) & (ratios < _LARGEST + 1)
    return bool(fits.all(2).any(1).all())


def _candidates(least: Tensor, largest: Tensor, integers: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the scales to try, in the shape channels x scales, likeliest first."""
    quotients = torch.cat([least[:, None] / _divisors((2, 3)), largest[:, None] / _divisors(integers)], 1).to(dtype)
    moved = {0: quotients}
    for sign, end in ((1, torch.inf), (-1, 0.0)):
        for ulps in (1, 2):
            moved[sign * ulps] = torch.nextafter(moved[sign * (ulps - 1)], torch.full_like(quotients, end))
    return torch.cat([least.to(dtype)[:, None], torch.stack([moved[ulps] for ulps in _ULPS], 2).flatten(1)], 1)


def _divisors(integers: Sequence[int]) -> Tensor:
    return torch.tensor(integers, dtype=torch.float64)


def _exact(values: Tensor, scales: Tensor) -> Tensor:
    integers = _integers(values, scales)
    return (integers.to(values.dtype) * scales == values) & (integers.abs() <= _LARGEST)
