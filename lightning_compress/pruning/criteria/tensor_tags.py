"""Notes on tensors, kept beside them."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class TensorMarks(Generic[T]):
    """What is known of tensors, by their identity; keeps none of them alive.

    A view of a whole tensor counts as that tensor: modules with full backward hooks hand on such views.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[weakref.ref[Tensor], T]] = {}

    def get(self, tensor: Tensor) -> T | None:
        root, key = _identity(tensor)
        entry = self._entries.get(key)
        # An id may have been used before, by a tensor that is gone.
        return entry[1] if entry is not None and entry[0]() is root else None

    def set(self, tensor: Tensor, mark: T | None) -> None:
        root, key = _identity(tensor)
        if mark is None:
            self._entries.pop(key, None)
        else:
            self._entries[key] = (weakref.ref(root), mark)

    def clear(self) -> None:
        self._entries.clear()


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same tensor, or views of the same whole."""
    return a is b or _identity(a)[1] == _identity(b)[1]


def _identity(tensor: Tensor) -> tuple[Tensor, Any]:
    """The tensor that owns the memory, and what tells this view of it from others."""
    base = tensor._base
    if base is None:
        return tensor, id(tensor)
    geometry = (tensor.shape, tensor.stride(), tensor.storage_offset())
    if geometry == (base.shape, base.stride(), base.storage_offset()):
        return base, id(base)
    return base, (id(base), *geometry)
