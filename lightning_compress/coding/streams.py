"""Base classes of writers and readers of numbers, equally likely values, coded symbols and raw bytes.

A writer only collects content and counts bits until `finish`. So several encodings of a tensor can be written to
scratch writers, of which the cheapest is kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NoReturn, TypeVar

import numpy as np

from lightning_compress.coding.errors import CorruptFileError
from lightning_compress.coding.packing import Array, pack, packed_bytes, unpack

T = TypeVar("T")
W = TypeVar("W", bound="Writer")

MAX_SYMBOLS = 4096  # largest alphabet
PIECE = 1 << 16  # symbols that are coded together; they fit into the cache
_DIGIT = 16  # most bits of a number that are written together


class Writer(ABC):
    """Collects the content of a file.

    Attributes:
        bits: The number of bits of the content so far.
        raws: The raw bytes, outside the stream: pairs of a number of bytes and a function that makes them.
        filled: The number of nonzero entries in each row of the last matrix whose zero map was written, or None.
        limit: The bits of the best alternative so far: a scratch writer that needs more is discarded.
    """

    adaptive = False  # whether `binary` is implemented
    relative = False  # whether relative indices are tried

    def __init__(self) -> None:
        self.bits = 0.0
        self.raws: list[tuple[int, Callable[[], Iterable[bytes]]]] = []
        self.filled: Array | None = None
        self.limit = math.inf

    def scratch(self: W) -> W:
        """Return an empty writer of the same kind, with the same `filled`."""
        writer = type(self)()
        writer.filled = self.filled
        return writer

    def extend(self: W, other: W) -> None:
        """Append the content of a scratch writer."""
        self.bits += other.bits
        self.raws += other.raws
        self.filled = other.filled

    def cheapest(self: W, ways: Iterable[Callable[[W], T]]) -> T:
        """Write with the alternative that takes the fewest bits, the first of equals, and return its result."""
        best: tuple[W, T] | None = None
        for way in ways:
            scratch = self.scratch()
            scratch.limit = math.inf if best is None else best[0].bits
            result = way(scratch)
            if best is None or scratch.bits < best[0].bits:
                best = scratch, result
        assert best is not None, "cheapest needs at least one alternative"
        self.extend(best[0])
        return best[1]

    @abstractmethod
    def uniform(self, values: Array | list[int], size: int) -> None:
        """Write integers of range(size) as equally likely; size is at most 2^24."""

    @abstractmethod
    def coded(self, symbols: Array, size: int) -> None:
        """Write integers of range(size) with a model of their frequencies; size is at most `MAX_SYMBOLS`."""

    def binary(self, symbols: Array, chances: Array) -> None:
        """Write zeros and ones; a one has the probability chances / 2^24, which the reader must be able to compute."""
        raise NotImplementedError

    def raw(self, data: bytes) -> None:
        """Write raw bytes."""
        self.packed(np.frombuffer(data, np.uint8), 8)

    def packed(self, values: Array, width: int) -> None:
        """Write unsigned integers of `width` bits each."""
        self.later(packed_bytes(len(values), width), partial(pack, values, width))

    def later(self, size: int, make: Callable[[], Iterable[bytes]]) -> None:
        """Reserve `size` raw bytes, which `make` yields when the file is written."""
        self.raws.append((size, make))
        self.bits += 8 * size

    @property
    def raw_bytes(self) -> int:
        """The number of raw bytes."""
        return sum(size for size, _ in self.raws)

    def raw_pieces(self) -> Iterator[bytes]:
        """Yield the raw bytes."""
        for _, make in self.raws:
            yield from make()

    def number(self, value: int) -> None:
        """Write an integer from 0 to 2^64 - 2 as Elias's delta code of the integer plus 1."""
        length = (value + 1).bit_length()
        prefix = length.bit_length()
        self.uniform([0] * (prefix - 1) + [1], 2)
        self._low_bits(length, prefix - 1)
        self._low_bits(value + 1, length - 1)

    def _low_bits(self, value: int, count: int) -> None:
        while count > 0:
            digit = min(count, _DIGIT)
            count -= digit
            self.uniform([value >> count & ((1 << digit) - 1)], 1 << digit)

    def signed(self, value: int) -> None:
        """Write an integer of either sign: 0, -1, 1, -2, ... are written as 0, 1, 2, 3, ..."""
        self.number(2 * value if value >= 0 else -2 * value - 1)

    @abstractmethod
    def finish(self) -> bytes:
        """Return the stream, without the raw bytes."""


class Reader(ABC):
    """Reads the content that a writer of the same kind wrote.

    Args:
        stream: The stream.
        raw: The raw bytes.

    Attributes:
        filled: The number of nonzero entries in each row of the last matrix whose zero map was read, or None.
    """

    def __init__(self, stream: memoryview, raw: memoryview) -> None:
        self.filled: Array | None = None
        self._stream = stream
        self._raw = raw
        self._position = 0

    def fail(self, problem: str) -> NoReturn:
        """Raise a CorruptFileError with a problem of the file; the caller adds the file's name."""
        raise CorruptFileError(problem)

    @property
    def raw_bits(self) -> int:
        """The number of raw bits read so far."""
        return 8 * self._position

    @property
    @abstractmethod
    def bits(self) -> float:
        """The number of bits of the stream read so far."""

    @abstractmethod
    def uniform(self, count: int, size: int) -> Array:
        """Read `count` integers that `Writer.uniform` wrote."""

    @abstractmethod
    def coded(self, count: int, lookup: Array) -> Iterator[Array]:
        """Read `count` symbols that `Writer.coded` wrote, and yield `lookup[symbols]` piece by piece."""

    def binary(self, chances: Array) -> Array:
        """Read the zeros and ones that `Writer.binary` wrote with the same probabilities."""
        self.fail("it has a learned zero map, which only coder='ans' can read")

    def raw(self, count: int) -> memoryview:
        """Read `count` raw bytes."""
        taken = self._raw[self._position : self._position + count]
        if len(taken) < count:
            self.fail(f"it is truncated: {count} bytes expected, {len(taken)} left")
        self._position += count
        return taken

    def packed(self, count: int, width: int) -> Array:
        """Read `count` integers that `Writer.packed` wrote."""
        return unpack(self.raw(packed_bytes(count, width)), count, width)

    def number(self, below: int = 1 << 64) -> int:
        """Read an integer that `Writer.number` wrote."""
        prefix = 1
        while not self.uniform(1, 2)[0]:
            prefix += 1
            if prefix > 7:
                self.fail("a number has no end")
        length = 1 << (prefix - 1) | self._low_bits(prefix - 1)
        if length > 65:
            self.fail(f"a number has {length} bits")
        value = (1 << (length - 1) | self._low_bits(length - 1)) - 1
        if value >= below:
            self.fail(f"a number is {value}, where less than {below} is expected")
        return value

    def _low_bits(self, count: int) -> int:
        value = 0
        while count > 0:
            digit = min(count, _DIGIT)
            count -= digit
            value = value << digit | int(self.uniform(1, 1 << digit)[0])
        return value

    def signed(self) -> int:
        """Read an integer that `Writer.signed` wrote."""
        value = self.number()
        return -(value + 1) // 2 if value % 2 else value // 2

    @abstractmethod
    def finish(self) -> None:
        """Raise a CorruptFileError unless all content has been read."""

    def _finish_raw(self) -> None:
        if self._position != len(self._raw):
            self.fail(f"{len(self._raw) - self._position} of its raw bytes belong to no tensor")


def count(symbols: Array, size: int) -> Array:
    """Return how often each symbol occurs; counting in pieces saves memory, because numpy converts to 64 bits."""
    if size == 2:
        ones = int(np.count_nonzero(symbols))
        return np.array([len(symbols) - ones, ones])
    counts = np.zeros(size, np.int64)
    for start in range(0, len(symbols), PIECE):
        counts += np.bincount(symbols[start : start + PIECE], minlength=size)
    return counts
