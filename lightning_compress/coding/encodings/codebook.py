"""The encoding of clustered weights: a table of the distinct values, and for each entry an index into it.

Entry i is table[index_i]. The table is written as plain values; the indices are entropy-coded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from lightning_compress.coding.encodings.plain import read_plain, write_plain
from lightning_compress.coding.packing import Array
from lightning_compress.coding.patterns import Words, one_zero
from lightning_compress.coding.streams import MAX_SYMBOLS, Reader, Writer

_HASHED = 512  # most distinct values that a perfect hash looks up; for more, binary search is used
_STEP = 1 << 16  # patterns that are looked up together; they fit into the cache
_SAMPLE = 1 << 18  # patterns from which the first table is made
_GLANCE = 1 << 13  # patterns of the sample that suffice to see that nearly all values differ


def distinct(words: Words, dtype: torch.dtype) -> tuple[Words, Array] | None:
    """Return the distinct patterns in ascending order, with -0.0 as 0.0, and the index of each entry.

    The result is None if there are more than `MAX_SYMBOLS` distinct patterns.

    Example:
        >>> table, index = distinct(np.array([7, 3, 7, 7], np.uint32), torch.int32)
        >>> table.tolist(), index.tolist()
        ([3, 7], [1, 0, 1, 1])
    """
    if len(words) <= _GLANCE:
        table, places = np.unique(words, return_inverse=True)
        return None if len(table) > MAX_SYMBOLS else _with_one_zero(table, places.astype(_index_kind(table)), dtype)
    sample = words[:: max(1, len(words) // _SAMPLE)][:_SAMPLE]
    glance = np.sort(sample[:_GLANCE])
    if np.count_nonzero(glance[1:] != glance[:-1]) >= MAX_SYMBOLS:
        return None
    table = np.unique(sample)
    while len(table) <= MAX_SYMBOLS:
        find = _finder(table, len(words))
        index = np.empty(len(words), _index_kind(table))
        for start in range(0, len(words), _STEP):
            piece = words[start : start + _STEP]
            index[start : start + _STEP] = places = find(piece)
            unknown = table.take(places, mode="clip") != piece
            if unknown.any():  # the sample did not contain all patterns
                table = np.union1d(table, piece[unknown])
                break
        else:
            return _with_one_zero(table, index, dtype)
    return None


def _index_kind(table: Words) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if len(table) <= 256 else np.uint16


def _with_one_zero(table: Words, index: Array, dtype: torch.dtype) -> tuple[Words, Array]:
    """Return a table and an index of the same entries, with -0.0 replaced by 0.0."""
    one = one_zero(table, dtype)
    if one is table:
        return table, index
    merged, places = np.unique(one, return_inverse=True)
    return merged, entries(places.astype(index.dtype), index)


def entries(table: Array, index: Array) -> Array:
    """Return table[index]; working in pieces saves memory, because numpy converts indices to 64 bits."""
    found = np.empty(len(index), table.dtype)
    for start in range(0, len(index), _STEP):
        table.take(index[start : start + _STEP], out=found[start : start + _STEP], mode="clip")
    return found


def without_zero(found: tuple[Words, Array] | None, present: Array) -> tuple[Words, Array] | None:
    """Return the table and the indices of the nonzero entries; the first value of the given table must be zero."""
    if found is None:
        return None
    table, index = found
    return table[1:], index[present] - index.dtype.type(1)


class _Finder:
    """Finds values in a table by a hash without collisions, which is the high bits of a product."""

    def __init__(self, table: Words) -> None:
        self._bits = max(4, 2 * int(len(table) - 1).bit_length() + 1)
        self._shift = table.dtype.type(8 * table.dtype.itemsize - self._bits)
        generator = np.random.default_rng(0)
        while True:
            self._factor = table.dtype.type(int(generator.integers(1 << 62)) % (1 << 8 * table.dtype.itemsize) | 1)
            slots = table * self._factor >> self._shift
            if len(np.unique(slots)) == len(table):
                break
        self._slots = np.zeros(1 << self._bits, np.uint8 if len(table) <= 256 else np.uint16)
        self._slots[slots] = np.arange(len(table))

    def __call__(self, words: Words) -> Array:
        slots = (words * self._factor >> self._shift).astype(np.intp)  # numpy 1 does not index with uint64
        found: Array = self._slots.take(slots, mode="clip")
        return found


def _finder(table: Words, count: int) -> Callable[[Words], Array]:
    if table.dtype.itemsize == 1:
        slots = np.zeros(256, np.uint8)
        slots[table] = np.arange(len(table))
        return slots.take
    if len(table) <= _HASHED and table.dtype.itemsize >= 4 and count > 8 * len(table):
        return _Finder(table)
    return lambda words: np.minimum(np.searchsorted(table, words), len(table) - 1)


def write_codebook(writer: Writer, table: Words, index: Array, dtype: torch.dtype, *, half: bool) -> None:
    """Write distinct patterns and the index of each entry; stop when the writer's limit is reached."""
    writer.number(len(table) - 1)
    write_plain(writer, table, dtype, half=half)
    if writer.bits < writer.limit:
        writer.coded(index, len(table))


def read_codebook(
    reader: Reader, count: int, dtype: torch.dtype, kind: np.dtype[np.generic]
) -> tuple[int, Iterator[Words]]:
    """Read what `write_codebook` wrote; return the size of the table, and an iterator over pieces of the values."""
    size = 1 + reader.number(MAX_SYMBOLS)
    table = np.concatenate(list(read_plain(reader, size, dtype, kind)[1]))
    return size, reader.coded(count, table)
