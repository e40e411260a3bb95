"""The tensors of a model by name, and slices of them by the positions that stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Kept = Mapping[str, Mapping[int, Tensor]]  # tensor name -> dim -> the positions that stay


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, by every name that each of them has."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return those of `named_tensors` that a state dict holds."""
    hidden = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return {name: tensor for name, tensor in named_tensors(model).items() if name not in hidden}


def select(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """Return a tensor with the given positions alone, along the given dimensions."""
    order = memory_format(tensor)
    for dim, keep in dims.items():
        tensor = tensor.index_select(dim, keep.to(tensor.device))
    return tensor.contiguous(memory_format=order)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Return the order of a tensor's numbers in memory, which slices of it that are copies should have, too."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def sliced(tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Slice tensors as a cut has sliced a network, given tensors with its names and its shapes before the cut.

    Example:
        >>> sliced({"fc.weight": torch.arange(6).view(2, 3)}, {"fc.weight": {1: torch.tensor([0, 2])}})
        {'fc.weight': tensor([[0, 2],
                [3, 5]])}
    """
    return {name: select(tensor, kept[name]) if name in kept else tensor for name, tensor in tensors.items()}
