"""Hooks for the time of a block, and hooks that are taken from a network whose handles nobody has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn


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


def unhook(network: nn.Module, mine: Callable[[Any], bool]) -> None:
    """Take hooks around the forward passes of a network's modules away, such as those that a copy has got.

    Args:
        network: The network.
        mine: Says of a hook whether it goes.

    Example:
        >>> import copy, torch
        >>> layer = nn.ReLU()
        >>> handle = layer.register_forward_hook(lambda *_: torch.ones(1))
        >>> other = copy.deepcopy(layer)
        >>> unhook(other, lambda hook: True)
        >>> layer(torch.zeros(1)), other(torch.zeros(1))
        (tensor([1.]), tensor([0.]))
    """
    for module in network.modules():
        for hooks, extra in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if mine(hook)]:
                del hooks[key]
                extra.pop(key, None)
