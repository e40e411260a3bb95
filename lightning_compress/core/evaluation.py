"""Run a network for a look at it, and leave it as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes, buffers and torch's random state are as before.

    Every submodule gets its own mode back, frozen ones too, and a buffer that the forward pass wrote to, replaced or
    added is undone. Not inference mode: a tensor that the network caches there could never be trained on.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> with evaluating(net):
        ...     net.training, net(torch.ones(3, 2)).requires_grad
        (False, False)
        >>> net.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    cuda_devices = sorted({buffer.device.index for buffer in (*model.parameters(), *model.buffers()) if buffer.is_cuda})
    with torch.random.fork_rng(cuda_devices), torch.no_grad(), buffers_restored(model):
        try:
            model.eval()
            yield
        finally:
            model.train(modes[0][1])  # for modules that do more in it than set the flag
            for module, training in modes:
                module.training = training


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Undo what a `with` block writes to buffers, replaces or adds."""
    buffers = [(module, dict(module._buffers.items())) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, registered in buffers:
            for name in set(module._buffers.keys()) - registered.keys():
                delattr(module, name)
            for name, buffer in registered.items():
                if module._buffers[name] is not buffer:
                    module._buffers[name] = buffer
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):  # an idle write would still count as one for autograd
                    buffer.copy_(value)


@contextmanager
def entries_restored(model: nn.Module) -> Iterator[None]:
    """Undo what a `with` block changes in the entries of modules, and in the dicts, lists and sets among these.

    A forward pass may keep masks and tables for the next one there, or hooks that it registers.
    """
    entries = [(module, dict(vars(module))) for module in model.modules()]
    contents = [(one, _content(one)) for one in _containers(model)]
    try:
        yield
    finally:
        for module, before in entries:
            mine = vars(module)
            for name in mine.keys() - before.keys():
                del mine[name]
            mine.update(before)
        for container, content in contents:
            now = _content(container)
            if len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True)):
                continue
            container.clear()
            if isinstance(container, dict):
                keys, values = content[: len(content) // 2], content[len(content) // 2 :]
                container.update(zip(keys, values, strict=True))
            elif isinstance(container, set):
                container.update(content)
            else:
                container.extend(content)


def take_rounding_away(model: nn.Module) -> None:
    """Let layers see their real inputs, within `entries_restored`, where hooks that say `rounds` change them.

    Rounding knows no channels, so that a cut does not concern it, and it makes large differences of the smallest.
    """
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "rounds", False)]:
            del hooks[key]


def _containers(model: nn.Module) -> Iterator[Any]:
    found: dict[int, Any] = {}
    left: list[Any] = [value for module in model.modules() for value in vars(module).values()]
    while left:
        one = left.pop()
        if isinstance(one, dict | list | set | deque) and id(one) not in found:
            found[id(one)] = one
            left += one.values() if isinstance(one, dict) else one
        elif isinstance(one, tuple):
            left += one
    return iter(found.values())


def _content(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
