"""Hooks for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Removable(Protocol):
    """A handle whose `remove` undoes something."""

    def remove(self) -> None: ...


@contextmanager
def hooked(*handles: Removable) -> Iterator[None]:
    """Remove hooks at the end of the block.

    Example:
        >>> import torch
        >>> layer, seen = torch.nn.ReLU(), []
        >>> with hooked(layer.register_forward_hook(lambda *_: seen.append("called"))):
        ...     _ = layer(torch.zeros(1))
        >>> _ = layer(torch.zeros(1))
        >>> seen
        ['called']
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
