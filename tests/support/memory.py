"""How many bytes are alive at once: counted by operators, the same on every machine, busy or idle."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make on the CPU within a `with` block, from their birth to their end.

    The fake tensors of torch.export's tracing hold nothing and count nothing.

    Attributes:
        alive: Bytes of those that are there now.
        most: The most that were there at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if _is_real(one)}
        result = func(*args, **(kwargs or {}))
        for storage in (one.untyped_storage() for one in tree_leaves(result) if _is_real(one)):
            if storage._cdata not in before | self._known:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.alive)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _is_real(one: Any) -> bool:
    return type(one) in (Tensor, nn.Parameter) and one.untyped_storage().device.type == "cpu"
