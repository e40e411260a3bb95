"""A network as a program of torch.export, which runs without this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.files import replacing
from lightning_compress.core.inputs import ExampleInputs, call


def capture(model: nn.Module, example_inputs: ExampleInputs) -> ExportedProgram:
    """Return the network's evaluation-mode computation as a program for any batch size.

    Args:
        model: Any module that `torch.export` takes, on the CPU; it stays as it is.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments; the first dimension of
            every tensor is the batch.

    Raises:
        ValueError: The program computes something else than the model, on a batch of another size.

    Example:
        >>> program = capture(nn.Linear(4, 2), torch.zeros(3, 4))
        >>> program.module()(torch.zeros(7, 4)).shape
        torch.Size([7, 2])
    """
    args, kwargs = _arguments(_resized(example_inputs, 2))  # of size 1 a dimension would not count as dynamic
    batch = Dim("batch")
    dynamic = tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) and leaf.dim() else None, (args, kwargs))
    with evaluating(model):
        shapes = dynamic[1] if kwargs else dynamic[0]
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        other = _resized(example_inputs, 3)
        compare(call(model, other), call(program.module(), other), "The exported program")
    return program


def save_program(program: ExportedProgram, path: str | Path) -> None:
    """Write what `torch.export.load(path).module()` reads and runs; the file appears whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file)


def _arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _resized(example_inputs: ExampleInputs, size: int) -> ExampleInputs:
    """As many samples as asked for, again from the first after the last."""
    plain = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs

    def resize(leaf: Any) -> Any:
        has_batch = isinstance(leaf, Tensor) and leaf.dim() > 0
        return leaf[torch.arange(size) % len(leaf)] if has_batch else leaf

    resized: ExampleInputs = tree_map(resize, plain)
    return resized


def compare(expected: Any, found: Any, what: str) -> None:
    """Raise a ValueError, of which `what` is the subject, unless the tensors are the same but for rounding."""
    for ours, theirs in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if isinstance(ours, Tensor) and not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{what} computes something else than the model: outputs differ by up to "
                f"{float((ours - theirs).abs().max()):.3g}. Does forward depend on its data, or draw random numbers?"
            )
