"""Run a network as it is, and leave it at an exit when the whole batch may."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.hooks import hooked


class _Leave(BaseException):  # which no network's code catches
    def __init__(self, found: Tensor | None) -> None:
        self.found = found


def run_whole(
    forward: Callable[[], Tensor],
    layers: Mapping[int, nn.Module],
    exits: Sequence[int],
    visit: Callable[[int, Tensor], Tensor | None],
    last: int | None = None,
) -> Tensor | None:
    """Return what the network does, or None if all samples have left.

    Args:
        forward: Runs the network.
        layers: By the numbers of the exits.
        exits: At which samples may leave.
        visit: Called with the number of an exit and its layer's output; returns an empty tensor if all samples
            may leave.
        last: The exit whose layer's output is returned; None: the network's output.
    """

    def at(cut: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if cut == last:
                raise _Leave(output)
            stay = visit(cut, output)
            if stay is not None and stay.shape[0] == 0:
                raise _Leave(None)

        return hook

    watched = [*exits, *([last] if last is not None else [])]
    with hooked(*(layers[cut].register_forward_hook(at(cut)) for cut in watched)):
        try:
            return forward()
        except _Leave as leave:
            return leave.found
