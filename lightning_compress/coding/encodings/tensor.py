"""Writes and reads one tensor with the encoding of the fewest bits: first the positions of its entries, then values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from lightning_compress.coding import patterns
from lightning_compress.coding.encodings import codebook, grid, plain, positions
from lightning_compress.coding.packing import Array
from lightning_compress.coding.patterns import Words
from lightning_compress.coding.streams import PIECE, Reader, Writer

_PLACES = ("dense", "zero map", "relative index")
_PLAIN, _CODEBOOK, _GRID = range(3)
_VALUES = 3
_FEW_ZEROS = 0.01  # fraction of zeros in a large tensor below which a zero map saves next to nothing
_LARGE = 1 << 20  # entries; for larger tensors, encodings that can't win are not tried
_SMALL = 1 << 22  # entries; for larger tensors, slow encodings are not tried
_AXES = 3  # a grid has one scale in all (0), or one for each index of the first (1) or the second dimension (2)


@dataclass(frozen=True)
class Encoding:
    """How a tensor is stored.

    Attributes:
        name: The encoding in words.
        distinct: The number of values of the codebook or the grid; None without one.
    """

    name: str
    distinct: int | None = None

    def at(self, places: int) -> Encoding:
        return replace(self, name=f"{_PLACES[places]}, {self.name}") if places else self


_WritePlaces = Callable[[Writer, float], None]  # gets a writer, and the most bits that are still of use
_EMPTY, _ALL_ZERO = Encoding("empty"), Encoding("all zero", 1)


def write_tensor(writer: Writer, tensor: Tensor, *, half: bool) -> Encoding:
    """Write the entries of a tensor with the encoding of the fewest bits, and return the encoding."""
    words = patterns.to_words(tensor)
    if not len(words):
        return _EMPTY
    dtype, shape = patterns.part_dtype(tensor.dtype), patterns.part_shape(tensor.dtype, tensor.shape)
    table = codebook.distinct(words, dtype)
    if table is None or len(words) <= _LARGE:  # a large tensor with a table is encoded from the table
        words = patterns.one_zero(words, dtype)

    def at(places: int, write_places: _WritePlaces, values: _Content) -> Callable[[Writer], Encoding]:
        def write(one: Writer) -> Encoding:
            one.uniform([places], len(_PLACES))
            rest = one.scratch()
            encoding = _write_values(rest, values, dtype, shape, half=half).at(places)
            write_places(one, one.limit - one.bits - rest.bits)
            rest.filled = one.filled
            one.extend(rest)
            return encoding

        return write

    present = _present(words, table)
    count = int(np.count_nonzero(present))
    ways = [at(positions.DENSE, lambda one, limit: None, _Content(words, table))]
    if len(words) > _LARGE and 2 * count < len(words):
        ways = []
    if len(words) - count > _FEW_ZEROS * len(words) or count < len(words) <= _SMALL:
        others = codebook.without_zero(table, present)
        sparse = _Content(words[present] if others is None else codebook.entries(*others), others, present)
        ways.append(at(positions.MAP, lambda one, limit: positions.write_map(one, present, shape, limit), sparse))
        if writer.relative and count:
            width = positions.best_width(present)
            padded, gaps = positions.padded(present, width)
            filled = np.zeros(len(words), np.bool_)
            filled[padded] = True
            values = _Content(words[padded], codebook.distinct(words[padded], dtype), filled)
            ways.append(at(positions.RELATIVE, lambda one, limit: positions.write_relative(one, gaps, width), values))
    return writer.cheapest(ways)


def _present(words: Words, table: tuple[Words, Array] | None) -> Array:
    """Return which entries are nonzero; with a codebook its index decides, which is faster."""
    if table is not None and table[0][0] != 0:
        return np.ones(len(words), np.bool_)
    found: Array = (words if table is None else table[1]) != 0
    return found


@dataclass(frozen=True)
class _Content:
    """Values to be written.

    Attributes:
        words: The bit patterns of the values.
        table: The codebook and the index of each value; None if there are too many distinct values.
        present: Which entries of the tensor the values are; None: all.
    """

    words: Words
    table: tuple[Words, Array] | None
    present: Array | None = None


def read_tensor(reader: Reader, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Encoding]:
    """Read a tensor that `write_tensor` wrote; return it and its encoding."""
    words = patterns.zero_words(dtype, shape)
    if not len(words):
        return patterns.to_tensor(words, dtype, shape), _EMPTY
    places = int(reader.uniform(1, len(_PLACES))[0])
    present = words.view(np.bool_)[-len(words) :]  # saves memory: values overwrite these bytes after use
    if places == positions.DENSE:
        count = len(words)
    else:
        whole = patterns.part_shape(dtype, shape)
        count = (
            positions.read_map(reader, present, whole)
            if places == positions.MAP
            else positions.read_relative(reader, present)
        )
    values, encoding = _read_values(
        reader, count, patterns.part_dtype(dtype), words.dtype, patterns.part_shape(dtype, shape)
    )
    for start in range(0, len(words), PIECE):
        piece = words[start : start + PIECE]
        if places == positions.DENSE:
            piece[:] = values.take(start + np.arange(len(piece)) if values.scaled else None, len(piece))
        else:
            where = np.flatnonzero(present[start : start + PIECE])
            piece[:] = 0
            piece[where] = values.take(start + where if values.scaled else None, len(where))
    if dtype == torch.bool and words.max() > 1:
        reader.fail("a bool is neither true nor false")
    return patterns.to_tensor(words, dtype, shape), encoding.at(places)


class _Values:
    """Returns values in portions of any size, whatever the size of the pieces that are read.

    Attributes:
        scaled: Whether `take` needs the positions of the values, to look up their scales.
    """

    scaled = False

    def __init__(self, pieces: Iterator[Array], kind: np.dtype[np.generic]) -> None:
        self._pieces = pieces
        self._left: Array = np.empty(0, kind)

    def take(self, places: Array | None, count: int) -> Words:
        """Return the next `count` values; `places` are their positions in the tensor, needed if `scaled`."""
        found = [self._left]
        missing = count - len(self._left)
        while missing > 0:
            found.append(next(self._pieces))
            missing -= len(found[-1])
        joined = found[-1] if len(found) == 1 or (not len(self._left) and len(found) == 2) else np.concatenate(found)
        self._left = joined[count:]
        return joined[:count]


class _ScaledValues(_Values):
    scaled = True

    def __init__(
        self, pieces: Iterator[Array], scales: Words, dtype: torch.dtype, shape: tuple[int, ...], axis: int
    ) -> None:
        super().__init__(pieces, np.dtype(np.int32))
        self._scales, self._dtype, self._shape, self._axis = scales, dtype, shape, axis

    def take(self, places: Array | None, count: int) -> Words:
        assert places is not None, "the scales depend on the positions"
        channel = _channel(places, self._shape, self._axis)
        return grid.scaled(super().take(None, count), self._scales[channel], self._dtype)


def _write_values(
    writer: Writer, values: _Content, dtype: torch.dtype, shape: tuple[int, ...], *, half: bool
) -> Encoding:
    words = values.words
    if not len(words):
        return _ALL_ZERO

    def plainly(one: Writer) -> Encoding:
        one.uniform([_PLAIN], _VALUES)
        return Encoding(plain.NAMES[plain.write_plain(one, words, dtype, half=half)])

    ways: list[Callable[[Writer], Encoding]] = [plainly]
    if values.table is not None and len(words) > _LARGE:  # next to so many indices a table costs nothing
        ways = []
    if values.table is not None:
        table, index = values.table

        def by_table(one: Writer) -> Encoding:
            one.uniform([_CODEBOOK], _VALUES)
            codebook.write_codebook(one, table, index, dtype, half=half)
            return _by_codebook(len(table))

        if len(table) < len(words):  # otherwise the table takes as much as the plain values
            ways.append(by_table)
        if dtype in grid.SCALED and (one_scale := grid.find_grid(table, dtype, np.zeros(1, np.int64))) is not None:
            ways.append(_on_grid(one_scale.scales, codebook.entries(one_scale.integers, index), dtype, 0))
    if dtype in grid.SCALED:
        for axis in range(1, min(_AXES, 1 + len(shape))):
            if (channels := _channel_grid(values, dtype, shape, axis)) is not None:
                ways.append(_on_grid(channels.scales, channels.integers, dtype, axis))
    return writer.cheapest(ways)


def _channel_grid(values: _Content, dtype: torch.dtype, shape: tuple[int, ...], axis: int) -> grid.Grid | None:
    """Return the grid with a scale for each index of the first (axis 1) or second dimension (axis 2), or None."""
    entries, channels = prod(shape), shape[axis - 1]
    if entries // channels < 2 or (axis > 1 and entries > _SMALL):
        return None
    if axis == 2 and values.present is None:
        return _second_axis_grid(values.words.reshape(shape[0], channels, -1), dtype)
    order: Array | slice = slice(None)
    if axis == 1:
        starts = np.arange(channels) * (entries // channels)
        if values.present is not None:
            starts = np.append(0, np.cumsum(np.add.reduceat(values.present, starts, dtype=np.int64))[:-1])
    else:
        where = np.arange(entries) if values.present is None else np.flatnonzero(values.present)
        each = _channel(where, shape, axis)
        order = np.argsort(each, kind="stable")
        starts = np.searchsorted(each[order], np.arange(channels))
    used = np.append(starts[1:], len(values.words)) > starts
    found = grid.find_grid(values.words[order], dtype, starts[used])
    if found is None:
        return None
    scales = np.zeros(channels, values.words.dtype)
    scales[used] = found.scales
    integers = np.empty_like(found.integers)
    integers[order] = found.integers
    return grid.Grid(scales, integers)


def _second_axis_grid(words: Words, dtype: torch.dtype) -> grid.Grid | None:
    """Return the grid with a scale for each index of the second of three dimensions, or None.

    The first four channels are tried alone, because they suffice to exclude most tensors.
    """
    by_channel = words.transpose(1, 0, 2)

    def find(some: Words) -> grid.Grid | None:
        return grid.find_grid(some.reshape(-1), dtype, np.arange(len(some)) * some[0].size)

    if find(by_channel[:4]) is None or (found := find(by_channel)) is None:
        return None
    integers = found.integers.reshape(by_channel.shape).transpose(1, 0, 2).reshape(-1)
    return grid.Grid(found.scales, integers)


def _on_grid(scales: Words, integers: Array, dtype: torch.dtype, axis: int) -> Callable[[Writer], Encoding]:
    def write(one: Writer) -> Encoding:
        one.uniform([_GRID], _VALUES)
        one.uniform([axis], _AXES)
        return _by_grid(grid.write_grid(one, grid.Grid(scales, integers), dtype), len(scales))

    return write


def _read_values(
    reader: Reader, count: int, dtype: torch.dtype, kind: np.dtype[np.generic], shape: tuple[int, ...]
) -> tuple[_Values, Encoding]:
    if not count:
        return _Values(iter(()), kind), _ALL_ZERO
    way = int(reader.uniform(1, _VALUES)[0])
    if way == _PLAIN:
        how, pieces = plain.read_plain(reader, count, dtype, kind)
        return _Values(pieces, kind), Encoding(plain.NAMES[how])
    if way == _CODEBOOK:
        size, pieces = codebook.read_codebook(reader, count, dtype, kind)
        return _Values(pieces, kind), _by_codebook(size)
    axis = int(reader.uniform(1, _AXES)[0])
    if dtype not in grid.SCALED or axis > len(shape) or (axis and prod(shape) < 2 * _channels(shape, axis)):
        reader.fail(f"it stores {dtype} of shape {shape} on a grid along dimension {axis - 1}")
    scales, size, integers = grid.read_grid(reader, count, dtype, kind, _channels(shape, axis))
    return _ScaledValues(integers, scales, dtype, shape, axis), _by_grid(size, len(scales))


def _by_codebook(size: int) -> Encoding:
    return Encoding(f"codebook of {size}", size)


def _by_grid(size: int, scales: int) -> Encoding:
    return Encoding(f"grid of {size}, " + ("one scale" if scales == 1 else f"{scales} scales"), size)


def _channels(shape: tuple[int, ...], axis: int) -> int:
    return shape[axis - 1] if axis else 1


def _channel(places: Array, shape: tuple[int, ...], axis: int) -> Array:
    if not axis:
        return np.zeros(len(places), np.int64)
    return places // prod(shape[axis:]) % shape[axis - 1]
