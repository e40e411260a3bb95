"""A network as a file that runs without this package: a program of torch.export, or ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.files import replacing
from lightning_compress.core.inputs import ExampleInputs, call, tensors


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
        _compare(call(model, other), call(program.module(), other), "The exported program")
    return program


def save_program(program: ExportedProgram, path: str | Path) -> None:
    """Write what `torch.export.load(path).module()` reads and runs; the file appears whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file)


def save_onnx(program: ExportedProgram, path: str | Path) -> None:
    """Write the program as ONNX, and compare what onnxruntime computes with it; the file appears whole or not at all.

    Raises:
        ImportError: The extra `deploy` is not installed.
        ValueError: onnxruntime computes something else.
    """
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise ImportError(
            f"ONNX files need {', '.join(missing)}, which the extra `deploy` brings: pip install "
            f"'lightning-compress[deploy]'."
        )
    import onnxruntime

    with _quiet():
        converted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert converted is not None
    args, kwargs = program.example_inputs
    expected = tensors((program.module()(*args, **kwargs),))
    with replacing(path) as temporary:
        converted.save(temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        feed = {name: leaf.numpy() for name, leaf in zip(names, tensors((*args, kwargs)), strict=True)}
        found = [torch.from_numpy(value) for value in session.run(None, feed)]
        _compare(expected, found, "The ONNX file, run by onnxruntime,")


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


def _compare(expected: Any, found: Any, what: str) -> None:
    for ours, theirs in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if isinstance(ours, Tensor) and not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{what} computes something else than the model: outputs differ by up to "
                f"{float((ours - theirs).abs().max()):.3g}. Does forward depend on its data, or draw random numbers?"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    # They tell of every optimisation, of torchvision's operators, and of a type that torch is going to rename.
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
