"""The streams of coder="huffman" and coder="none": whole bits, the highest bit of each byte first.

Huffman-coded symbols are part of the raw bytes, in pieces of 2^23 symbols. A piece has the number of bits of each lane
in 3 bytes, then the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from lightning_compress.coding import huffman
from lightning_compress.coding.packing import Array, packed_bytes
from lightning_compress.coding.streams import PIECE, Reader, Writer, count

_PIECE = 1 << 23  # symbols; it has so many lanes that the overhead of decoding them together pays off
_LANE_BYTES = 3


class BitWriter(Writer):
    """Writes each symbol in a fixed number of bits."""

    relative = True

    def __init__(self) -> None:
        super().__init__()
        self._fields: list[tuple[Array | list[int], int]] = []

    def extend(self, other: BitWriter) -> None:
        super().extend(other)
        self._fields += other._fields

    def uniform(self, values: Array | list[int], size: int) -> None:
        width = (size - 1).bit_length()
        if width and len(values):
            self._fields.append((values, width))
            self.bits += len(values) * width

    def coded(self, symbols: Array, size: int) -> None:
        self.packed(symbols, (size - 1).bit_length())

    def finish(self) -> bytes:
        text = "".join(format(int(value), f"0{width}b") for values, width in self._fields for value in values)
        return int(text + "0" * (-len(text) % 8) or "0", 2).to_bytes(-(-len(text) // 8), "big")


class HuffmanWriter(BitWriter):
    """Writes symbols in Huffman codes where these are shorter than a fixed number of bits."""

    def coded(self, symbols: Array, size: int) -> None:
        if size == 1 or not len(symbols):
            return
        counts = count(symbols, size)
        lengths = huffman.code_lengths(counts.tolist())
        longest = max(lengths)
        bits = 8 * _huffman_bytes(int(counts @ np.array(lengths)), len(symbols))
        if bits + 6 + size * longest.bit_length() >= 8 * packed_bytes(len(symbols), (size - 1).bit_length()):
            self.uniform([0], 2)
            super().coded(symbols, size)
            return
        self.uniform([1], 2)
        self.number(longest)
        self.uniform(lengths, longest + 1)
        for start in range(0, len(symbols), _PIECE):
            piece = symbols[start : start + _PIECE]
            there = int(count(piece, size) @ np.array(lengths))
            self.later(_huffman_bytes(there, len(piece)), partial(_huffman_pieces, piece, lengths))


def _huffman_bytes(bits: int, symbols: int) -> int:
    return _LANE_BYTES * -(-symbols // huffman.LANE) + -(-bits // 8)


def _huffman_pieces(symbols: Array, lengths: list[int]) -> Iterator[bytes]:
    words, lanes = huffman.encode(symbols, lengths)
    yield b"".join(int(bits).to_bytes(_LANE_BYTES, "big") for bits in lanes)
    yield words.astype(">u4").tobytes()[: -(-int(lanes.sum()) // 8)]


class BitReader(Reader):
    """Reads the content that a `BitWriter` wrote."""

    def __init__(self, stream: memoryview, raw: memoryview) -> None:
        super().__init__(stream, raw)
        self._place = 0

    @property
    def bits(self) -> float:
        return self._place

    def uniform(self, count: int, size: int) -> Array:
        width = (size - 1).bit_length()
        start, end = self._place, self._place + count * width
        if end > 8 * len(self._stream):
            self.fail(f"its stream is truncated: {end} bits expected, {8 * len(self._stream)} found")
        self._place = end
        if not width:
            return np.zeros(count, np.int64)
        octets = np.frombuffer(self._stream[start // 8 : -(-end // 8)], np.uint8)
        bits = np.unpackbits(octets)[start % 8 : start % 8 + count * width].reshape(count, width)
        found: Array = bits.astype(np.int64) @ (1 << np.arange(width)[::-1])
        if count and found.max() >= size:
            self.fail(f"a symbol is {found.max()}, where less than {size} is expected")
        return found

    def coded(self, count: int, lookup: Array) -> Iterator[Array]:
        width = (len(lookup) - 1).bit_length()
        for start in range(0, count, PIECE):
            yield self._look_up(lookup, self.packed(min(PIECE, count - start), width))

    def _look_up(self, lookup: Array, symbols: Array) -> Array:
        if len(symbols) and symbols.max() >= len(lookup):
            self.fail(f"a symbol is {symbols.max()}, where less than {len(lookup)} is expected")
        return lookup.take(symbols, mode="clip")

    def finish(self) -> None:
        self._finish_raw()
        left = bytes(self._stream)[self._place // 8 :]
        if len(left) > 1 or (left and (not self._place % 8 or left[0] << self._place % 8 & 0xFF)):
            self.fail("its stream continues after the last tensor")


class HuffmanReader(BitReader):
    """Reads the content that a `HuffmanWriter` wrote."""

    def coded(self, count: int, lookup: Array) -> Iterator[Array]:
        size = len(lookup)
        if size == 1 or not count or not self.uniform(1, 2)[0]:
            yield from super().coded(count, lookup)
            return
        longest = self.number(huffman.MAX_LENGTH + 1)
        lengths = self.uniform(size, longest + 1).tolist()
        for start in range(0, count, _PIECE):
            here = min(_PIECE, count - start)
            octets = np.frombuffer(self.raw(_LANE_BYTES * -(-here // huffman.LANE)), np.uint8).reshape(-1, _LANE_BYTES)
            lanes = octets.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
            codes = bytes(self.raw(-(-int(lanes.sum()) // 8)))
            words = np.frombuffer(codes + bytes(-len(codes) % 4), ">u4").astype(np.uint32)
            try:
                symbols = huffman.decode(words, lanes, here, lengths)
            except ValueError as error:
                self.fail(str(error))
            yield lookup.take(symbols, mode="clip")
