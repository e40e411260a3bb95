"""Packs integers of a few bits without gaps; the first integer is in the highest bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_AT_ONCE = 1 << 18  # integers per piece; a multiple of 8, so every piece ends at a whole byte


def packed_bytes(count: int, width: int) -> int:
    """Return the number of bytes into which `pack` puts `count` integers of `width` bits.

    Example:
        >>> packed_bytes(3, 3), packed_bytes(0, 7)
        (2, 0)
    """
    return -(-count * width // 8)


def pack(values: Array, width: int) -> Iterator[bytes]:
    """Yield unsigned integers below 2^width as bytes, `packed_bytes(len(values), width)` in all.

    Example:
        >>> b"".join(pack(np.array([1, 2, 3, 4]), 4)).hex()
        '1234'
    """
    for i in range(0, len(values) if width else 0, _AT_ONCE):
        yield _pack(values[i : i + _AT_ONCE], width).tobytes()


def unpack(data: bytes | memoryview, count: int, width: int) -> Array:
    """Return the integers from the bytes that `pack` made.

    Example:
        >>> unpack(bytes.fromhex("1234"), 4, 4).tolist()
        [1, 2, 3, 4]
    """
    kind = np.dtype(_kind(width))
    raw = np.frombuffer(data, np.uint8)
    if 8 * kind.itemsize == width:
        whole: Array = raw.view(kind.newbyteorder(">")).astype(kind)
        return whole
    found = np.zeros(count, kind)
    for i in range(0, count if width else 0, _AT_ONCE):
        piece = raw[i * width // 8 : packed_bytes(min(i + _AT_ONCE, count), width)]
        found[i : i + _AT_ONCE] = _unpack(piece, min(_AT_ONCE, count - i), width)
    return found


def _kind(width: int) -> Any:
    return next(kind for bits, kind in _KINDS if width <= bits)


_KINDS = ((8, np.uint8), (16, np.uint16), (32, np.uint32), (64, np.uint64))


def _pack(values: Array, width: int) -> Array:
    kind = np.dtype(_kind(width))
    if 8 * kind.itemsize == width:
        return values.astype(kind.newbyteorder(">")).view(np.uint8)
    if width in (2, 4):
        each = 8 // width
        padded = np.zeros(-(-len(values) // each) * each, np.uint8)
        padded[: len(values)] = values
        whole = np.zeros(len(padded) // each, np.uint8)
        for place in range(each):
            whole |= padded[place::each] << (8 - width * (place + 1))
        return whole
    octets = values.astype(kind.newbyteorder(">")).view(np.uint8).reshape(len(values), kind.itemsize)
    return np.packbits(np.unpackbits(octets, axis=1)[:, -width:])


def _unpack(raw: Array, count: int, width: int) -> Array:
    if width in (2, 4):
        each = 8 // width
        apart = np.empty((len(raw), each), np.uint8)
        for place in range(each):
            apart[:, place] = (raw >> (8 - width * (place + 1))) & ((1 << width) - 1)
        return apart.reshape(-1)[:count]
    kind = np.dtype(_kind(width))
    bits = np.zeros((count, 8 * kind.itemsize), np.uint8)
    bits[:, -width:] = np.unpackbits(raw, count=count * width).reshape(count, width)
    return np.packbits(bits, axis=1).reshape(-1).view(kind.newbyteorder(">"))
