"""A model with random values in double precision, for as long as something is tried out with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_compress.core.attention import make_sliceable
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.inputs import ExampleInputs


@contextmanager
def laboratory(model: nn.Module, example_inputs: ExampleInputs) -> Iterator[ExampleInputs]:
    """Evaluation mode, random parameters and double precision; afterwards everything is as before.

    Every branch of the network matters then, also one that a tiny layer scale or a norm that starts at zero would hide,
    and a difference is either rounding or an error. Yields the example inputs in double precision.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    before = [(tensor, tensor.data, tensor.grad) for tensor in tensors]
    with evaluating(model), all_sliceable(model):
        try:
            for name, parameter in model.named_parameters():
                parameter.grad = None
                if parameter.is_floating_point():
                    parameter.data = _random(name, parameter, generator)
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.data = _random(name, buffer, generator) if "running_" in name else buffer.data.double()
            yield tree_map_only(
                Tensor, lambda one: one.double() if one.is_floating_point() else one, _as_tree(example_inputs)
            )
        finally:
            for tensor, data, gradient in before:
                tensor.grad = None
                tensor.data = data
                tensor.grad = gradient


@contextmanager
def all_sliceable(model: nn.Module) -> Iterator[None]:
    """Torch's attention modules in the form that survives a cut."""
    undo = [make_sliceable(one) for one in model.modules() if type(one) is nn.MultiheadAttention]
    try:
        yield
    finally:
        for one in undo:
            one()


def _as_tree(example_inputs: ExampleInputs) -> ExampleInputs:
    return example_inputs if isinstance(example_inputs, Tensor | tuple) else dict(example_inputs)


def _random(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights of variance 1 / fan-in; scales and variances around 1, so that signals keep their size."""
    shape = tuple(tensor.shape)
    normal = torch.randn(shape, dtype=torch.float64, generator=generator)
    if name.endswith(("running_var", "weight")) and len(shape) == 1:
        values = normal.abs_().clamp_(max=2).mul_(0.5).add_(0.5)
    elif len(shape) > 1:
        values = normal.mul_((tensor.numel() / max(shape[0], 1)) ** -0.5)
    else:
        values = normal.mul_(0.3)
    return values.to(tensor.device)
