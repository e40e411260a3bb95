"""Capture the arguments and the output of a network while the user's own step runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_compress.core.hooks import hooked
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.unwrap import SLOT, innermost


@contextmanager
def captured(
    module: LightningModule,
    network: str,
    before: Callable[[tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[Any], None],
) -> Iterator[Callable[[], None]]:
    """Call `before` with the network's arguments and `after` with its output, when the block runs it.

    The context manager yields a function that raises an error unless the block has run the network.

    Args:
        module: The wrapper around the LightningModule that holds the network.
        network: Dotted path of the network; empty: the module's own forward.
        before: Called with the positional and the keyword arguments, before the network sees them.
        after: Called with the output, before the caller sees it.

    Raises:
        ValueError: There is no such network, or the block ran it twice.
    """
    calls = 0
    inside: Any = getattr(module, SLOT)
    folder = inside.folders[0]  # a wrapper inside may replay the step in another one

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        if inside.folders[0] != folder:
            return
        calls += 1
        if calls > 1:
            raise ValueError(
                f"{_said(module, network)} was called twice in one step, so that the "
                f"output to use is not clear: call it once, with all samples in one batch."
            )
        before(args, kwargs)

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if inside.folders[0] == folder:
            after(output)

    def was_called() -> None:
        if calls == 0:
            children = ", ".join(repr(name) for name, _ in module.named_children())
            raise ValueError(
                f"{_said(module, network)} was not called in the training_step of {_kind(module)} (a "
                f"call of .forward(...) runs no hooks): pass network= with the path of the submodule whose output is "
                f"the prediction; there are {children}."
            )

    watched = resolve_network(module, network)
    with hooked(
        watched.register_forward_pre_hook(enter, with_kwargs=True),
        watched.register_forward_hook(leave),
    ):
        yield was_called


def _said(module: LightningModule, network: str) -> str:
    return f"network={network!r}" if network else f"The forward of {_kind(module)}"


def _kind(module: LightningModule) -> str:
    return type(innermost(module)).__name__
