"""Restore a network when changing it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress.core.tensors import named_tensors


def forget_graphs(parameter: Tensor) -> None:
    """Make autograd forget a parameter's old shape, which it would reuse while an earlier graph is alive.

    A change of the dtype and back has this effect. It also drops the hooks of DistributedDataParallel, which must wrap
    the network anew.
    """
    data, gradient = parameter.data, parameter.grad
    parameter.grad = None
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float16 else torch.float16)
    parameter.data = data
    parameter.grad = gradient


@contextmanager
def as_before_on_error(model: nn.Module, *, values: bool = False) -> Iterator[None]:
    """Restore a model's tensors and attributes if the block raises an error.

    Args:
        model: The model.
        values: Whether to restore the tensors' values too, which are copied for this; else only replaced tensors.
    """
    modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
    inner = [(one, dict(one)) for _, _, held in modules for one in held.values() if isinstance(one, dict)]
    owned = {id(one): one for one in named_tensors(model).values() if not is_lazy(one)}.values()
    tensors = [(one, one.data, one.data.clone() if values else None, one.grad) for one in owned]
    try:
        yield
    except BaseException:
        for module, kind, held in modules:
            if type(module) is not kind:
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(held)
        for one, entries in inner:
            one.clear()
            one.update(entries)
        for tensor, data, copied, gradient in tensors:
            tensor.grad = None
            reshaped, tensor.data = tensor.shape != data.shape, data
            if reshaped and tensor.requires_grad:
                forget_graphs(tensor)
            tensor.grad = gradient
            if copied is not None:
                data.copy_(copied)
        raise
