"""The encodings of the positions of nonzero entries.

DENSE      all entries are stored, zeros included
MAP        one bit per entry, entropy-coded
RELATIVE   Deep Compression's relative indices: the number of zeros before each stored entry, in k bits; if there are
           more than 2^k - 1, a zero is stored as well
"""

from __future__ import annotations

import math
from math import prod
from typing import TypeVar

import numpy as np

from lightning_compress.coding.encodings.adaptive import (
    MOST_STEPS,
    RATES,
    SETTINGS,
    least_bits,
    read_adaptive,
    write_adaptive,
)
from lightning_compress.coding.packing import Array
from lightning_compress.coding.streams import Reader, Writer

W = TypeVar("W", bound=Writer)
DENSE, MAP, RELATIVE = range(3)
_MOST_BITS = 12  # of a gap
_LEAST_LEARNED, _MOST_LEARNED = 256, 1 << 22  # entries; with fewer, learning saves nothing; with more, it is too slow
_ALL_RATES = 1 << 19  # most entries for which all learning rates are tried


def write_map(writer: Writer, present: Array, shape: tuple[int, ...], limit: float = math.inf) -> None:
    """Write the map of nonzero entries, with one probability for all entries or with learned ones.

    Args:
        writer: The writer.
        present: For each entry whether it is nonzero.
        shape: The shape of the tensor.
        limit: Learning is skipped if the map would take more bits in any case.
    """
    if writer.adaptive and shape and _LEAST_LEARNED <= len(present) <= _MOST_LEARNED:
        _write_cheapest(writer, present, shape, limit)
    else:
        _write_one_chance(writer, present)
    writer.filled = _filled(present, shape, writer.filled)


def _write_cheapest(writer: Writer, present: Array, shape: tuple[int, ...], limit: float) -> None:
    rows = shape[0]
    axes = [axis for axis, steps in enumerate((rows, len(present) // rows)) if steps <= MOST_STEPS]
    plain = writer.scratch()
    _write_one_chance(plain, present)
    inputs = _inputs(writer.filled, shape)
    useful = min(plain.bits, limit) + 1e-6 - 1
    if useful < SETTINGS or min(least_bits(present, rows, axis, inputs) for axis in axes) > useful:
        writer.extend(plain)
        return
    axis, best = min(((axis, _learned(writer, present, shape, axis, 0)) for axis in axes), key=lambda one: one[1].bits)
    if len(present) <= _ALL_RATES:
        others = (_learned(writer, present, shape, axis, rate) for rate in range(1, len(RATES)))
        best = min([best, *others], key=lambda one: one.bits)
    writer.extend(best if best.bits < plain.bits else plain)


def _write_one_chance(writer: Writer, present: Array) -> None:
    writer.uniform([0], 2)
    writer.coded(present.view(np.uint8), 2)


def _learned(writer: W, present: Array, shape: tuple[int, ...], axis: int, rate: int) -> W:
    scratch = writer.scratch()
    scratch.uniform([1], 2)
    write_adaptive(scratch, present, shape[0], axis, rate, _inputs(writer.filled, shape))
    return scratch


def read_map(reader: Reader, out: Array, shape: tuple[int, ...]) -> int:
    """Read a map that `write_map` wrote: set `out` to true where entries are nonzero, and return their number."""
    if reader.uniform(1, 2)[0]:
        if not shape or len(out) > _MOST_LEARNED:  # a crafted map could take hours
            reader.fail(f"a tensor of shape {shape} has a learned zero map, which is for 1 to {_MOST_LEARNED} entries")
        read_adaptive(reader, out, shape[0], _inputs(reader.filled, shape))
    else:
        position = 0
        for piece in reader.coded(len(out), np.array([False, True])):
            out[position : position + len(piece)] = piece
            position += len(piece)
    reader.filled = _filled(out, shape, reader.filled)
    return int(np.count_nonzero(out))


def _filled(present: Array, shape: tuple[int, ...], before: Array | None) -> Array | None:
    """Return the number of nonzero entries of each row; for a vector, such as a bias, return the earlier numbers."""
    if len(shape) < 2:
        return before
    return np.count_nonzero(present.reshape(shape[0], -1), axis=1) if len(present) <= _MOST_LEARNED else None


def _inputs(filled: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Return for each column the number of nonzero entries in the row of the earlier matrix that computes its input.

    The result is None if the sizes do not match.
    """
    columns = prod(shape[1:])
    return None if filled is None or columns % len(filled) else np.repeat(filled, columns // len(filled))


def padded(present: Array, width: int) -> tuple[Array, Array]:
    """Return the positions of the stored entries, padding zeros included, and the gaps before them in `width` bits.

    Example:
        >>> positions, gaps = padded(np.array([1, 0, 0, 0, 0, 0, 1], bool), 2)
        >>> positions.tolist(), gaps.tolist()
        ([0, 4, 6], [0, 3, 1])
    """
    positions = np.flatnonzero(present)
    reach = 1 << width
    distances = np.diff(positions, prepend=-1)
    fillers = (distances - 1) // reach
    ends = np.cumsum(fillers + 1)
    gaps = np.full(int(ends[-1]) if len(ends) else 0, reach - 1, np.uint16)
    gaps[ends - 1] = distances - 1 - fillers * reach
    return np.cumsum(gaps.astype(np.int64) + 1) - 1, gaps


def write_relative(writer: Writer, gaps: Array, width: int) -> None:
    """Write gaps of `width` bits."""
    writer.number(width - 1)
    writer.number(len(gaps))
    writer.coded(gaps, 1 << width)


def read_relative(reader: Reader, out: Array) -> int:
    """Read gaps that `write_relative` wrote: set `out` to true where an entry is stored, and return their number."""
    width = 1 + reader.number(_MOST_BITS)
    count = reader.number(len(out) + 1)
    position = -1
    for gaps in reader.coded(count, np.arange(1 << width, dtype=np.int64)):
        places = position + np.cumsum(gaps + 1)
        position = int(places[-1])
        if position >= len(out):
            reader.fail("its gaps lead past the end of a tensor")
        out[places] = True
    return count


def best_width(present: Array) -> int:
    """Return the number of bits of a gap for which gaps and padding together take the fewest bits, by their entropy.

    Example:
        >>> best_width(np.arange(4000) % 16 == 15)
        4
    """
    costs = {}
    for width in range(2, _MOST_BITS + 1):
        _, gaps = padded(present, width)
        counts = np.bincount(gaps, minlength=1)
        shares = counts[counts > 0] / len(gaps)
        costs[width] = len(gaps) * (1 - shares @ np.log2(shares)) + 5 * len(counts)
    return min(costs, key=costs.__getitem__)
