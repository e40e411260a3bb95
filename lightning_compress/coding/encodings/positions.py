"""Where the entries are that are not zero.

DENSE      everywhere
MAP        one bit per entry, entropy-coded
RELATIVE   Deep Compression: the number of zeros before each, in k bits; where 2^k - 1 do not suffice, a zero is
           stored as if it were none
"""

from __future__ import annotations

import numpy as np

from lightning_compress.coding.patterns import Words
from lightning_compress.coding.streams import Array, Reader, Writer

DENSE, MAP, RELATIVE = range(3)
_MOST_BITS = 12  # of a gap


def write_map(writer: Writer, present: Array) -> None:
    """Write which entries are not zero."""
    writer.coded(present.view(np.uint8), 2)


def read_map(reader: Reader, out: Words) -> int:
    """Set the entries that are not zero to 1, and return how many there are."""
    position = total = 0
    for piece in reader.coded(len(out), np.array([0, 1], np.uint8)):
        out[position : position + len(piece)] = piece
        position += len(piece)
        total += int(np.count_nonzero(piece))
    return total


def padded(present: Array, width: int) -> tuple[Array, Array]:
    """Return the positions that gaps of so many bits lead to, and the gaps.

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
    """Write gaps of so many bits."""
    writer.number(width - 1)
    writer.number(len(gaps))
    writer.coded(gaps, 1 << width)


def read_relative(reader: Reader, out: Words) -> int:
    """Set the entries that gaps lead to to 1, and return how many there are."""
    width = 1 + reader.number(_MOST_BITS)
    count = reader.number(len(out) + 1)
    position = -1
    for gaps in reader.coded(count, np.arange(1 << width, dtype=np.int64)):
        places = position + np.cumsum(gaps + 1)
        position = int(places[-1])
        if position >= len(out):
            reader.fail("its gaps lead past the end of a tensor")
        out[places] = 1
    return count


def best_width(present: Array) -> int:
    """Return the bits of a gap that take the least room for gaps and padding, counted at the entropy.

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
