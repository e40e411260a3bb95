"""Example inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def call(model: Callable[..., Any], example_inputs: ExampleInputs) -> Any:
    """Return the model's output for the example inputs.

    Example:
        >>> call(torch.add, (torch.ones(2), torch.ones(2)))
        tensor([2., 2.])
        >>> call(torch.add, {"input": torch.ones(2), "other": 1})
        tensor([2., 2.])
    """
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple):
        return model(*example_inputs)
    return model(example_inputs)


def tensors(example_inputs: ExampleInputs) -> list[Tensor]:
    """Return the tensors among the example inputs, nested ones too, in order."""
    return [leaf for leaf in tree_leaves(_plain(example_inputs)) if isinstance(leaf, Tensor)]


def batch_size(example_inputs: ExampleInputs) -> int:
    """Return the number of samples: the first dimension of the first tensor.

    Raises:
        ValueError: There is no tensor, the first one has no dimension, or the batch is empty.

    Example:
        >>> batch_size({"x": torch.zeros(8, 3), "scale": 0.5})
        8
    """
    known = isinstance(example_inputs, Tensor | tuple | Mapping)
    first = next(iter(tensors(example_inputs)), None) if known else None
    if first is None:
        raise ValueError(
            "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword arguments, with at "
            f"least one tensor in it; got {example_inputs!r}."
        )
    if first.dim() == 0 or first.shape[0] == 0:
        raise ValueError(
            f"example_inputs need at least one sample, batch first; the first tensor has shape {tuple(first.shape)}."
        )
    return first.shape[0]


FEW = 4  # samples that suffice to look at a network


def first_samples(example_inputs: ExampleInputs, samples: int = FEW) -> ExampleInputs:
    """Return the example inputs with at most so many samples.

    Example:
        >>> first_samples((torch.zeros(8, 3), {"scale": torch.ones(2)}), 2)[0].shape
        torch.Size([2, 3])
    """
    n = batch_size(example_inputs)

    def first(leaf: Any) -> Any:
        return leaf[:samples] if isinstance(leaf, Tensor) and leaf.shape[:1] == (n,) else leaf

    few: ExampleInputs = tree_map(first, _plain(example_inputs))
    return few


def to_device(example_inputs: ExampleInputs, device: torch.device | str) -> ExampleInputs:
    """Return the example inputs with every tensor on `device`.

    Example:
        >>> to_device((torch.zeros(2, 3), {"scale": 0.5}), "meta")
        (tensor(..., device='meta', size=(2, 3)), {'scale': 0.5})
    """
    moved: ExampleInputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), _plain(example_inputs))
    return moved


def to_type(example_inputs: ExampleInputs, dtype: torch.dtype) -> ExampleInputs:
    """Return the example inputs with every floating-point tensor of type `dtype`, as a network of that type takes them.

    Example:
        >>> to_type((torch.zeros(1), torch.tensor([3])), torch.float64)
        (tensor([0.], dtype=torch.float64), tensor([3]))
    """
    cast: ExampleInputs = tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, _plain(example_inputs)
    )
    return cast


def _plain(example_inputs: ExampleInputs) -> ExampleInputs:
    # a tokenizer's output is a Mapping but no dict, so a tree walk would take it for a leaf
    return dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
