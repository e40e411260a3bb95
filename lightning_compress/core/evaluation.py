"""Run a network for a look at it, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    buffers = [(module, dict(module._buffers.items())) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    cuda_devices = sorted({buffer.device.index for buffer in (*model.parameters(), *model.buffers()) if buffer.is_cuda})
    with torch.random.fork_rng(cuda_devices), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            model.train(modes[0][1])  # for modules that do more in it than set the flag
            for module, training in modes:
                module.training = training
            for module, registered in buffers:
                for name in set(module._buffers.keys()) - registered.keys():
                    delattr(module, name)
                for name, buffer in registered.items():
                    if module._buffers[name] is not buffer:
                        module._buffers[name] = buffer
            for buffer, value in values:
                if not torch.equal(buffer, value):  # an idle write would still count as one for autograd
                    buffer.copy_(value)
