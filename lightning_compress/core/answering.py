"""Have something else answer the calls of a network, in place, for a while or until it is taken back.

    network(x)   runs its hooks, and vars(network)["forward"](x) between them

What is put there may say by `by` which module computes, such as the network with fewer channels: whoever reads layers
of the network hooks into `answering_now(network)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_SLOTS = ("forward", "_compiled_call_impl")  # a network that was compiled in place would ignore its forward
_WAY = "_lightning_compress_way"


class Answer:
    """A function that answers the calls of a network.

    Attributes:
        by: The module that computes the answers; None: the network itself, as far as anyone knows.
        name: Names how the network runs, such as "width 0.5", for what is kept for each way; empty: as it is.
    """

    name: str = ""

    def __init__(self, forward: Callable[..., Any], by: nn.Module | None = None) -> None:
        self._forward = forward
        self._by = by

    @property
    def by(self) -> nn.Module | None:
        return self._by

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


@contextmanager
def answering(network: nn.Module, forward: Callable[..., Any], by: nn.Module | None = None) -> Iterator[None]:
    """Have another function answer calls of a network within a block, between the network's own hooks.

    Args:
        network: The network.
        forward: The function.
        by: The module that computes in the network's place, for `answering_now`; None: it stays the one that it is.

    Example:
        >>> half, whole = nn.Linear(2, 1), nn.Linear(2, 2)
        >>> with answering(whole, half.forward, by=half):
        ...     answering_now(whole) is half
        True
        >>> answering_now(whole) is whole
        True
    """
    entries = vars(network)
    held = {name: entries[name] for name in _SLOTS if name in entries}
    now = answering_now(network)
    put(network, Answer(forward, now if by is None and now is not network else by))
    try:
        yield
    finally:
        for name in _SLOTS:
            entries.pop(name, None)
        entries.update(held)


def answering_now(network: nn.Module) -> nn.Module:
    """Return the module that computes in a network's place now: the network itself, unless another one answers."""
    by = getattr(vars(network).get("forward"), "by", None)
    return by if isinstance(by, nn.Module) else network


def way_now(network: nn.Module) -> str:
    """Return the name of the way in which a network runs now, such as "width 0.5"; "": as it is."""
    return str(getattr(vars(network).get("forward"), "name", ""))


def mark_way(module: nn.Module, way: str) -> None:
    """Note on a module, such as a layer of a thinner network, that it computes in this way of its network."""
    vars(module)[_WAY] = way


def way_of(module: nn.Module) -> str:
    """Return the way of its network in which a module computes; "": that of the network as it is.

    Example:
        >>> thin = nn.Linear(1, 1)
        >>> mark_way(thin, "width 0.5"); way_of(thin), way_of(nn.Linear(2, 2))
        ('width 0.5', '')
    """
    found: str = getattr(module, _WAY, "")
    return found


def copied_alone(network: nn.Module) -> nn.Module:
    """Return a copy of what computes in a network's place now, whose tensors are its own."""
    by = answering_now(network)
    if by is network:
        return copy.deepcopy(network)
    memo: dict[int, Any] = {}
    for module in by.modules():
        for table, kind in ((module._parameters, nn.Parameter), (module._buffers, Tensor.clone)):
            for tensor in table.values():
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = kind(tensor.detach().clone())  # it may be a slice, and a part of a graph
        memo[id(vars(module).get("_trainer"))] = None
    return copy.deepcopy(by, memo)


def put(network: nn.Module, answer: Answer | None) -> None:
    """Have a function answer calls of a network from now on; None: its own forward answers again.

    A network that was compiled in place compiles the function, too.
    """
    vars(network).pop("forward", None)
    if answer is not None:
        vars(network)["forward"] = answer
