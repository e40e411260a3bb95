"""Converts tensors of every dtype to bit patterns, which are unsigned integers, and back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

Words = np.ndarray[Any, np.dtype[Any]]  # unsigned integers, one dimension

DTYPES = (  # a file stores a dtype as its position here
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.complex128),
)
_AT_ONCE = 1 << 18  # patterns per piece
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def part_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the real numbers of which the numbers of a dtype consist.

    Example:
        >>> part_dtype(torch.complex64), part_dtype(torch.int8)
        (torch.float32, torch.int8)
    """
    return _PARTS.get(dtype, dtype)


def part_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the real numbers of which a tensor consists.

    Example:
        >>> part_shape(torch.complex64, [3, 4]), part_shape(torch.int8, [3, 4])
        ((3, 4, 2), (3, 4))
    """
    return (*shape, 2) if dtype in _PARTS else tuple(shape)


def to_words(tensor: Tensor) -> Words:
    """Return the bit patterns of a tensor's real numbers in row-major order.

    Example:
        >>> [hex(word) for word in to_words(torch.tensor([1.0, -0.0, -2.0]))]
        ['0x3f800000', '0x80000000', '0xc0000000']
    """
    flat = (
        tensor.detach().resolve_conj().resolve_neg().cpu().reshape(-1).contiguous()
    )  # reshape alone keeps an expanded vector expanded
    words: Words = flat.view(torch.uint8).numpy().view(_UNSIGNED[part_dtype(tensor.dtype).itemsize])
    return words


def one_zero(words: Words, dtype: torch.dtype) -> Words:
    """Return the patterns with -0.0 replaced by 0.0; without a -0.0 it is the same array.

    Example:
        >>> one_zero(to_words(torch.tensor([-0.0, -2.0])), torch.float32).tolist() == [0, 0xC0000000]
        True
    """
    if not dtype.is_floating_point:
        return words
    minus_zero = words.dtype.type(1 << (8 * dtype.itemsize - 1))
    own = words
    for start in range(0, len(words), _AT_ONCE):
        found = words[start : start + _AT_ONCE] == minus_zero
        if found.any():
            own = words.copy() if own is words else own
            own[start : start + _AT_ONCE][found] = 0
    return own


def to_tensor(words: Words, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return the tensor that has these bit patterns; it shares their memory.

    Example:
        >>> to_tensor(np.array([0x3F800000, 0xC0000000], np.uint32), torch.float32, (1, 2))
        tensor([[ 1., -2.]])
    """
    return torch.from_numpy(words.view(np.uint8)).view(dtype).reshape(tuple(shape))


def zero_words(dtype: torch.dtype, shape: Sequence[int]) -> Words:
    """Return the bit patterns of a tensor of zeros."""
    return np.zeros(prod(part_shape(dtype, shape)), _UNSIGNED[part_dtype(dtype).itemsize])
