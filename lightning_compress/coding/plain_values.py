"""Converts plain Python values to bytes and back, for the metadata of a state dict.

The first byte is the kind of the value: N None, T True, F False, i an integer (its length, then its bytes), f a float
of 8 bytes, s a string and b bytes (length first), l a list, t a tuple, d a dict (number of items first). Lengths and
numbers of items have 7 bits in each byte, lowest first; the eighth bit is set if another byte follows.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

_DEPTH = 32  # deepest nesting that a reader accepts
_EACH = 64  # bytes that a value takes in memory, its content not counted


def to_bytes(value: Any, where: str = "the metadata", depth: int = _DEPTH) -> bytes:
    """Return a value as bytes.

    Args:
        value: The value.
        where: What holds the value, for the message.
        depth: How deep values may be nested in it.

    Raises:
        ValueError: The value is or contains something other than None, bool, int, float, str, bytes, list, tuple and
            mapping, or is nested deeper than `from_bytes` reads.

    Example:
        >>> to_bytes({"num_heads": 2})
        b'd\\x01s\\tnum_headsi\\x01\\x02'
    """
    if not depth:
        raise ValueError(
            f"{where} holds values that are nested more than {_DEPTH} deep, or in themselves; a compressed file takes "
            f"no deeper ones. Flatten them."
        )
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"T", False: b"F"}[value]
    if isinstance(value, int):
        return b"i" + _sized(value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if isinstance(value, float):
        return b"f" + struct.pack("<d", value)
    if isinstance(value, str):
        return b"s" + _sized(value.encode())
    if isinstance(value, bytes):
        return b"b" + _sized(value)
    if isinstance(value, list | tuple):
        kind = b"l" if isinstance(value, list) else b"t"
        return kind + varint(len(value)) + b"".join(to_bytes(one, where, depth - 1) for one in value)
    if isinstance(value, Mapping):
        items = (to_bytes(one, where, depth - 1) for pair in value.items() for one in pair)
        return b"d" + varint(len(value)) + b"".join(items)
    raise ValueError(
        f"{where} holds a {type(value).__name__}; a compressed file takes only None, bool, int, float, str, bytes, "
        f"list, tuple and dict. Convert it, or leave it out."
    )


def memory(value: Any) -> int:
    """Estimate how many bytes of memory `from_bytes` needs for a value.

    Example:
        >>> memory([1, "xy"])
        195
    """
    if isinstance(value, Mapping):
        return _EACH + sum(memory(one) for pair in value.items() for one in pair)
    if isinstance(value, list | tuple):
        return _EACH + sum(map(memory, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return _EACH + value.bit_length() // 8 + 1
    return _EACH + (len(value.encode()) if isinstance(value, str) else len(value) if isinstance(value, bytes) else 0)


def from_bytes(data: bytes, limit: int | None = None) -> Any:
    """Return the value from the bytes that `to_bytes` made.

    Args:
        data: The bytes.
        limit: How much memory the value may take, as `memory` counts it; None: any amount.

    Raises:
        ValueError: `to_bytes` did not make these bytes, or the value takes more memory.

    Example:
        >>> from_bytes(to_bytes({"scale": {0: [0, 3]}}))
        {'scale': {0: [0, 3]}}
    """
    reader = _Bytes(data, limit)
    value = reader.value(_DEPTH)
    if reader.position != len(data):
        raise ValueError(f"{len(data) - reader.position} bytes are left over")
    return value


def varint(number: int) -> bytes:
    """Return a number as bytes of 7 bits each, lowest first; the eighth bit is set if another byte follows.

    Example:
        >>> varint(300)
        b'\\xac\\x02'
    """
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def read_varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return the number that starts at a position, and the position after it.

    Raises:
        ValueError: The number has no end, or more than 64 bits.
    """
    number = shift = 0
    while position < len(data) and shift < 64:
        number |= (data[position] & 0x7F) << shift
        position += 1
        if data[position - 1] < 0x80:
            return number, position
        shift += 7
    raise ValueError("a number has no end")


def _sized(data: bytes) -> bytes:
    return varint(len(data)) + data


class _Bytes:
    """Reads values from bytes, and counts the memory that they take."""

    def __init__(self, data: bytes, limit: int | None) -> None:
        self.data = data
        self.limit = limit
        self.position = 0
        self.used = 0

    def use(self, size: int) -> None:
        self.used += size
        if self.limit is not None and self.used > self.limit:
            raise ValueError(f"its values take more than the {self.limit} bytes of memory that they may take")

    def take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise ValueError(f"{count} bytes expected, {len(taken)} left")
        self.position += count
        return taken

    def length(self) -> int:
        number, self.position = read_varint(self.data, self.position)
        return number

    def value(self, depth: int) -> Any:
        if not depth:
            raise ValueError(f"values are nested more than {_DEPTH} deep")
        self.use(_EACH)
        kind = self.take(1)
        if kind in b"NTF":
            return {b"N": None, b"T": True, b"F": False}[kind]
        if kind == b"f":
            return struct.unpack("<d", self.take(8))[0]
        if kind not in b"isbltd":
            raise ValueError(f"a value of kind {kind!r} is unknown")
        length = self.length()
        if kind in b"isb":
            self.use(length)
            taken = self.take(length)
            if kind == b"i":
                return int.from_bytes(taken, "little", signed=True)
            return taken.decode() if kind == b"s" else taken
        if length > len(self.data) - self.position:  # an item takes at least a byte
            raise ValueError(f"{length} items expected in {len(self.data) - self.position} bytes")
        if kind == b"d":
            pairs = [(self.value(depth - 1), self.value(depth - 1)) for _ in range(length)]
            try:
                return dict(pairs)
            except TypeError as error:
                raise ValueError(str(error)) from error
        items = [self.value(depth - 1) for _ in range(length)]
        return items if kind == b"l" else tuple(items)
