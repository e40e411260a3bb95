"""Capture the arguments and outputs of a network while the user's own step runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.unwrap import innermost


@contextmanager
def captured(
    module: LightningModule,
    network: str,
    before: Callable[[tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[Any], None],
) -> Iterator[Callable[[], None]]:
    """Call `before` with the network's arguments and `after` with its output, when the block runs it.

    Yields a function that refuses a block which did not.

    Args:
        module: Has the network.
        network: Its dotted path; empty: the module's own forward.
        before: Called with the positional and the keyword arguments, before the network sees them.
        after: Called with the output, before the caller sees it.

    Raises:
        ValueError: There is no such network, or the block ran it twice.
    """
    calls = 0

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ValueError(
                f"{_said(module, network)} was called twice in one training_step, so that what it should learn from is "
                f"not told: call it once, with all samples in one batch."
            )
        before(args, kwargs)

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        after(output)

    def was_called() -> None:
        if calls == 0:
            children = ", ".join(repr(name) for name, _ in module.named_children())
            raise ValueError(
                f"{_said(module, network)} was not called in the training_step of {_kind(module)} (through "
                f".forward(...) it is not seen): pass network= with the path of the submodule whose output is the "
                f"prediction; there are {children}."
            )

    watched = resolve_network(module, network)
    with hooked(
        watched.register_forward_pre_hook(enter, with_kwargs=True),
        watched.register_forward_hook(leave),
    ):
        yield was_called


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove the hooks at the block's end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def select_output(found: Any, output: str | int | None, who: str) -> Tensor:
    """Return the tensor that `output` picks from what a network or layer returned.

    Args:
        found: A tensor, or a dict, tuple, list or object that has it.
        output: Key, position or attribute; None: `logits`, as networks of `transformers` have it; a tensor is taken as
            it is.
        who: Whose output it is, for the message.

    Raises:
        ValueError: There is no such entry, or it is no tensor.

    Example:
        >>> select_output({"logits": Tensor([1.0])}, "logits", "network")
        tensor([1.])
    """
    picked: Any = found
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if output is None and isinstance(logits, Tensor):
        return logits
    if output is not None and not isinstance(found, Tensor):  # of student and teacher, one may return just the tensor
        try:
            if isinstance(found, Mapping | tuple | list) and not (isinstance(output, str) and hasattr(found, output)):
                picked = found[output]  # type: ignore[index]  # a selector that does not fit is refused below
            else:
                picked = getattr(found, str(output))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{who} returns {_described(found)}, which has no output={output!r}.") from error
    if not isinstance(picked, Tensor):
        what = _described(picked) if output is None else f"{_described(picked)} as output={output!r}"
        raise ValueError(
            f"{who} returns {what}, and no tensor: pass output= with the key, position or attribute of it."
        )
    return picked


def _described(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a {type(found).__name__} with {', '.join(map(repr, found))}"
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)}"
    return f"a {type(found).__name__}"


def _said(module: LightningModule, network: str) -> str:
    return f"network={network!r}" if network else f"The forward of {_kind(module)}"


def _kind(module: LightningModule) -> str:
    return type(innermost(module)).__name__
