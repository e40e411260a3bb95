"""The encoding of values without a table: raw, as float16, or in as few bits as all of them fit into."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from lightning_compress.coding.patterns import Words
from lightning_compress.coding.streams import PIECE, Reader, Writer

RAW, HALF, SHORT = range(3)
NAMES = ("raw", "float16", "packed")
_WITHOUT_SIGN = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_HALVED = {torch.float32: (1 << 13) - 1, torch.float64: (1 << 42) - 1}  # the mantissa bits that float16 lacks


def write_plain(writer: Writer, words: Words, dtype: torch.dtype, *, half: bool) -> int:
    """Write bit patterns with the cheapest of three encodings, and return its number.

    RAW stores all bits. HALF stores values as float16, if that is exact. SHORT stores floats without the low bits that
    are zero in all of them, and integers minus the least one.

    Args:
        writer: The writer.
        words: The bit patterns of the values.
        dtype: The dtype of the values.
        half: Whether float32 and float64 are rounded to float16 first; they are not if a number would become infinite.
    """
    if half and dtype in _HALVED:
        words = _rounded(words, dtype)
    ways: list[Callable[[Writer], int]] = [lambda one: _write_raw(one, words)]
    used = int(np.bitwise_or.reduce(words[:256])) if len(words) else 0
    if dtype in _HALVED and not used & _HALVED[dtype] and _is_half(words[:256], dtype) and _is_half(words, dtype):
        ways.append(lambda one: _write_half(one, words, dtype))
    if not dtype.is_floating_point or not used & 1:  # otherwise SHORT saves no bits
        ways.append(lambda one: _write_short(one, words, dtype))
    return writer.cheapest(ways)


def read_plain(
    reader: Reader, count: int, dtype: torch.dtype, kind: np.dtype[np.generic]
) -> tuple[int, Iterator[Words]]:
    """Read what `write_plain` wrote; return the number of the encoding, and an iterator over pieces of the patterns.

    Args:
        reader: The reader.
        count: The number of values.
        dtype: The dtype of the values.
        kind: The unsigned integer type of the patterns.
    """
    way = int(reader.uniform(1, 3)[0])
    bits = 8 * kind.itemsize
    width = reader.number(bits + 1) if way == SHORT else 0
    least = 0
    if way == SHORT and not dtype.is_floating_point:
        least = reader.number() if dtype in _WITHOUT_SIGN else reader.signed()
    if way == HALF and dtype not in _HALVED:
        reader.fail(f"it stores {dtype} as float16, which is for float32 and float64")
    return way, _pieces(reader, count, dtype, kind, way, width, least)


def _pieces(
    reader: Reader, count: int, dtype: torch.dtype, kind: np.dtype[np.generic], way: int, width: int, least: int
) -> Iterator[Words]:
    bits = 8 * kind.itemsize
    for start in range(0, count, PIECE):
        here = min(PIECE, count - start)
        if way == RAW:
            yield reader.packed(here, bits)
        elif way == HALF:
            yield _from_half(reader.packed(here, 16).view(np.float16), kind)
        elif dtype.is_floating_point:
            yield reader.packed(here, width).astype(kind) << kind.type(bits - width if width else 0)
        else:
            yield reader.packed(here, width).astype(kind) + np.array(least % (1 << bits), kind)


def _write_raw(writer: Writer, words: Words) -> int:
    writer.uniform([RAW], 3)
    writer.packed(words, 8 * words.dtype.itemsize)
    return RAW


def _write_half(writer: Writer, words: Words, dtype: torch.dtype) -> int:
    writer.uniform([HALF], 3)
    writer.packed(_to_half(words, dtype).view(np.uint16), 16)
    return HALF


def _write_short(writer: Writer, words: Words, dtype: torch.dtype) -> int:
    writer.uniform([SHORT], 3)
    bits = 8 * words.dtype.itemsize
    if dtype.is_floating_point:
        used = int(np.bitwise_or.reduce(words)) if len(words) else 0
        width = bits - ((used & -used).bit_length() - 1) if used else 0
        writer.number(width)
        writer.packed(words >> words.dtype.type(bits - width if width else 0), width)
        return SHORT
    numbers = words if dtype in _WITHOUT_SIGN else words.view(f"i{words.dtype.itemsize}")
    least = int(numbers.min()) if len(numbers) else 0
    above = words - np.array(least % (1 << bits), words.dtype)
    width = int(above.max()).bit_length() if len(above) else 0
    writer.number(width)
    (writer.number if dtype in _WITHOUT_SIGN else writer.signed)(least)
    writer.packed(above, width)
    return SHORT


def _to_half(words: Words, dtype: torch.dtype) -> Words:
    with np.errstate(over="ignore", invalid="ignore"):
        return words.view(f"f{dtype.itemsize}").astype(np.float16)


def _from_half(halves: Words, kind: np.dtype[np.generic]) -> Words:
    with np.errstate(invalid="ignore"):
        return halves.astype(f"f{kind.itemsize}").view(kind)


def _is_half(words: Words, dtype: torch.dtype) -> bool:
    halves = _to_half(words, dtype)  # the bits of a converted NaN depend on the machine
    return not np.isnan(halves).any() and np.array_equal(_from_half(halves, words.dtype), words)


def _rounded(words: Words, dtype: torch.dtype) -> Words:
    halves = _to_half(words, dtype)
    finite = np.isfinite(words.view(f"f{dtype.itemsize}")).all()
    return _from_half(halves, words.dtype) if finite and np.isfinite(halves).all() else words
