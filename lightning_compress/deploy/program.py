"""Exports a network as a program of torch.export, which runs without this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from lightning_compress.core.axes import BATCH, Axes, exported
from lightning_compress.core.evaluation import caches_off, evaluating
from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.files import replacing
from lightning_compress.core.tensors import named_tensors


def capture(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None,
) -> ExportedProgram:
    """Return the network's evaluation-mode computation as a program for any batch size.

    Args:
        model: Any module that `torch.export` accepts, on the CPU. It is not changed.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments. The first dimension of
            the first tensor is the batch. So is the first dimension of every other tensor of the same batch size,
            unless the model then fails, as with a mask of shape (T, T).
        dynamic: Other dimensions whose size may vary, by the input's name or position: {"input_ids": {1: "length"},
            "attention_mask": {1: "length"}}. Dimensions of the same name have the same size.

    Raises:
        ValueError: On inputs of other sizes, the program and the model compute different results, or the model fails;
            or `dynamic` names something that is not a dimension of an input.

    Example:
        >>> program = capture(nn.Linear(4, 2), torch.zeros(3, 4))
        >>> program.module()(torch.zeros(7, 4)).shape
        torch.Size([7, 2])
    """
    if empty := next((name for name, one in named_tensors(model).items() if one.is_meta), None):
        raise ValueError(
            f"{empty} of {type(model).__name__} is on the meta device and has no values: load the weights first."
        )
    with evaluating(model), caches_off(model):
        axes = Axes.of(model, example_inputs, dynamic or {})
        small = axes.resized({name: 2 if name == BATCH else max(size, 2) for name, size in axes.sizes.items()})
        try:
            program = exported(model, small, axes, {name: Dim(name) for name in axes.sizes})
        except torch._dynamo.exc.UserError:  # a size has a bound, as from a table of positions; DYNAMIC finds it
            found = {name: Dim(name) if name == BATCH else Dim.DYNAMIC for name in axes.sizes}
            program = exported(model, small, axes, found)
        other = axes.others(lambda inputs: call(model, inputs))
        compare(call(model, other), call(program.module(), other), "The exported program")
    return program


def save_program(program: ExportedProgram, path: str | Path) -> None:
    """Write a program to a file for `torch.export.load(path).module()`; on failure an old file stays unchanged."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file)


def compare(expected: Any, found: Any, what: str) -> None:
    """Raise a ValueError unless all tensors are equal up to rounding; `what` is the subject of its message."""
    for ours, theirs in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if isinstance(ours, Tensor) and not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{what} computes something else than the model: outputs differ by up to "
                f"{float((ours - theirs).abs().max()):.3g}, more than rounding explains. Check whether forward depends "
                f"on the values of its inputs, or draws random numbers."
            )
