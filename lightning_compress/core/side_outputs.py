"""Modules that read layers of a network from its side, such as exit heads: part of it for whoever plans cuts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


class SideReader(nn.Module):
    """A child of a network that reads layers of it, and that the network's forward does not call."""

    def reading(self, network: nn.Module, found: list[Tensor]) -> AbstractContextManager[None]:
        """While the block runs the network, append to `found` what this module makes of its layers.

        Args:
            network: The parent.
            found: Gets the outputs.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply reading().")


@contextmanager
def side_outputs(model: nn.Module) -> Iterator[None]:
    """Have a model return also what its side readers make, after its own output, while the block runs it.

    So a graph of the model shows that they use its layers, and a comparison of outputs covers them. A model without
    side readers stays as it is.
    """
    readers = [
        (child, parent)
        for parent in model.modules()
        for child in parent.children()
        if isinstance(child, SideReader) and child is not model
    ]
    if not readers:
        yield
        return
    found: list[Tensor] = []

    def returning(_: nn.Module, args: Any, output: Any) -> Any:
        added = (output, *found)
        found.clear()
        return added

    with ExitStack() as stack:
        stack.callback(model.register_forward_hook(returning).remove)
        for child, parent in readers:
            stack.enter_context(child.reading(parent, found))
        yield
