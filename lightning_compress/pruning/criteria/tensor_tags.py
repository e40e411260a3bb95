"""Tags on tensors, which are stored outside of the tensors and keep none of them alive."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class TensorMarks(Generic[T]):
    """A mapping from tensors, by identity, to tags. It keeps no tensor alive.

    A view of a whole tensor counts as that tensor, because modules with full backward hooks return such views.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[weakref.ref[Tensor], T]] = {}

    def get(self, tensor: Tensor) -> T | None:
        root, key = _identity(tensor)
        entry = self._entries.get(key)
        # The id may be that of an earlier tensor, which has been freed.
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
    """Whether both are the same tensor, or the same view of one tensor."""
    return a is b or _identity(a)[1] == _identity(b)[1]


def _identity(tensor: Tensor) -> tuple[Tensor, Any]:
    """Return the tensor that owns the memory, and a key that distinguishes this view of it from others."""
    base = tensor._base
    if base is None:
        return tensor, id(tensor)
    geometry = (tensor.shape, tensor.stride(), tensor.storage_offset())
    if geometry == (base.shape, base.stride(), base.storage_offset()):
        return base, id(base)
    return base, (id(base), *geometry)
