"""Canonical Huffman codes, for which a file stores only the lengths, and their fast decoding.

Codes are assigned in ascending order to symbols sorted by code length, then by symbol. A long sequence of symbols is
cut into lanes that start at known bits; the decoder advances all lanes together by one table look-up per symbol.

Paper: Huffman, A method for the construction of minimum-redundancy codes (1952).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from lightning_compress.coding.packing import Array

MAX_LENGTH = 16  # bits of a code
LANE = 1 << 13  # symbols per lane
_FEW = 1 << 16  # most symbols that are decoded one by one
_PAIRED = 128  # largest alphabet whose symbols are encoded in pairs


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Return the bits of each symbol's code, at most `MAX_LENGTH`; 0 for a symbol that does not occur.

    If a code is longer, the counts are halved until it is not.

    Example:
        >>> code_lengths([5, 0, 2, 1, 1])
        [1, 0, 2, 3, 3]
    """
    while True:
        lengths = _unlimited(counts)
        if max(lengths, default=0) <= MAX_LENGTH:
            return lengths
        counts = [(count + 1) // 2 for count in counts]


def _unlimited(counts: Sequence[int]) -> list[int]:
    lengths = [0] * len(counts)
    heap = [(count, symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, first, one), (b, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in one + other:
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, first, one + other))
    return lengths


def codes(lengths: Sequence[int]) -> list[int]:
    """Return the canonical codes with the given lengths.

    Raises:
        ValueError: No complete code has these lengths.

    Example:
        >>> codes([1, 0, 2, 3, 3])
        [0, 0, 2, 6, 7]
    """
    used = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
    if sum(1 << (MAX_LENGTH - length) for length, _ in used) != 1 << MAX_LENGTH and len(used) != 1:
        raise ValueError(f"no complete code has the lengths {[length for length, _ in used][:8]}")
    found, code, before = [0] * len(lengths), 0, 0
    for length, symbol in used:
        code <<= length - before
        found[symbol] = code
        code, before = code + 1, length
    return found


def encode(symbols: Array, lengths: Sequence[int]) -> tuple[Array, Array]:
    """Return the codes of symbols as 32-bit words, highest bit first, and the number of bits of each lane.

    Example:
        >>> words, lanes = encode(np.array([0, 3, 2]), [1, 0, 2, 3, 3])
        >>> [f"{word:032b}"[:6] for word in words], lanes.tolist()
        (['011010'], [6])
    """
    symbols, table, widths, each = _in_pairs(symbols, lengths)
    lane = LANE // each
    lanes = np.zeros(-(-len(symbols) // lane), np.int64)
    pieces: list[Array] = []
    carry, filled = np.uint64(0), 0  # the last word, which is not full yet, and how many of its bits are used
    for start in range(0, len(symbols), lane * 8):
        piece = symbols[start : start + lane * 8]
        width = widths.take(piece)
        ends = np.cumsum(width)
        places = np.arange(0, len(piece), lane)
        lanes[start // lane : start // lane + len(places)] = np.add.reduceat(width, places)
        first = ends - width + filled
        shifted = table.take(piece) << (64 - width - (first & 31)).astype(np.uint64)
        word = first >> 5
        heads = np.flatnonzero(np.diff(word, prepend=-1))
        summed = np.add.reduceat(shifted, heads)  # codes share no bits, so their sum joins them
        total = int(ends[-1]) + filled
        words = np.zeros((total >> 5) + 2, np.uint64)
        words[word[heads]] += summed >> np.uint64(32)
        words[word[heads] + 1] += summed & np.uint64(0xFFFFFFFF)
        words[0] += carry
        pieces.append(words[: total >> 5].astype(np.uint32))
        carry, filled = words[total >> 5], total & 31
    if filled:
        pieces.append(np.array([carry], np.uint32))
    return np.concatenate([np.zeros(0, np.uint32), *pieces]), lanes


def _in_pairs(symbols: Array, lengths: Sequence[int]) -> tuple[Array, Array, Array, int]:
    """Join symbols to pairs if a table of all pairs is small.

    Return the symbols or pairs, the code and the length of each possible one, and how many symbols one has (1 or 2).
    """
    table, widths = np.array(codes(lengths), np.uint64), np.array(lengths, np.int64)
    if len(lengths) > _PAIRED:
        return symbols, table, widths, 1
    table, widths = np.append(table, table[:1] * 0), np.append(widths, 0)  # a filler of 0 bits for the last pair
    size = len(widths)
    first = symbols[::2].astype(np.uint16) * np.uint16(size)
    first[: len(symbols) // 2] += symbols[1::2].astype(np.uint16)
    if len(symbols) % 2:
        first[-1] += size - 1
    pair_table = (table[:, None] << widths.astype(np.uint64) | table).reshape(-1)
    return first, pair_table, (widths[:, None] + widths).reshape(-1), 2


def decode(words: Array, lanes: Array, count: int, lengths: Sequence[int]) -> Array:
    """Return the symbols from the result of `encode`.

    Args:
        words: The codes, as 32-bit words.
        lanes: The number of bits of each lane.
        count: The number of symbols.
        lengths: The bits of each symbol's code.

    Raises:
        ValueError: The words are not the codes of so many symbols.
    """
    longest = max(lengths)
    table = _table(lengths, longest)
    starts = np.cumsum(lanes) - lanes
    if count <= _FEW:
        return _one_by_one(words, starts, lanes, count, table, longest)
    wide = np.zeros(len(words), np.uint64)  # each word, followed by the next word
    wide |= words.astype(np.uint64) << np.uint64(32)
    wide[:-1] |= words[1:].astype(np.uint64)
    last = count - (len(lanes) - 1) * LANE  # number of symbols of the last lane
    found = np.empty((LANE, len(lanes)), np.uint16)
    position, ends = starts.copy(), starts + lanes
    shift = 64 - longest
    for step in range(LANE):
        if step == last:
            _check(position[-1:], ends[-1:])
            position, ends = position[:-1], ends[:-1]
        window = wide.take(position >> 5, mode="clip")
        code = (window >> (shift - (position & 31)).astype(np.uint64)).astype(np.int64) & ((1 << longest) - 1)
        entry = table.take(code)
        found[step, : len(position)] = entry >> 5
        position += entry & 31
    _check(position, ends)
    return np.ascontiguousarray(found.T).reshape(-1)[:count]


def _check(position: Array, end: Array) -> None:
    if not np.array_equal(position, end):
        raise ValueError("a lane of Huffman codes ends elsewhere than announced")


def _table(lengths: Sequence[int], longest: int) -> Array:
    """Return a table that maps the next `longest` bits to 32 * symbol + length of its code."""
    table = np.zeros(1 << longest, np.int32)
    for symbol, (code, length) in enumerate(zip(codes(lengths), lengths, strict=True)):
        if length:
            table[code << (longest - length) : (code + 1) << (longest - length)] = symbol << 5 | length
    if len([length for length in lengths if length]) == 1:
        table[:] = table[0]
    return table


def _one_by_one(words: Array, starts: Array, lanes: Array, count: int, table: Array, longest: int) -> Array:
    bits = int.from_bytes(words.astype(">u4").tobytes(), "big")
    have = 32 * len(words)
    entries = table.tolist()
    mask = (1 << longest) - 1
    found = np.empty(count, np.uint16)
    for lane, (start, size) in enumerate(zip(starts.tolist(), lanes.tolist(), strict=True)):
        if start + size > have:
            raise ValueError("a lane of Huffman codes ends after the last byte")
        # Only this lane, with zeros appended: shifting all words for each symbol would take quadratic time.
        rest = (bits >> (have - start - size) & ((1 << size) - 1)) << longest
        position = size
        symbols = []
        for _ in range(min(LANE, count - lane * LANE)):
            entry = entries[rest >> position & mask] if position >= 0 else 0
            symbols.append(entry >> 5)
            position -= entry & 31
        if position:
            raise ValueError("a lane of Huffman codes ends elsewhere than announced")
        found[lane * LANE : lane * LANE + len(symbols)] = symbols
    return found
