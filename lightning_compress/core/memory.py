"""Tensors that share memory: a write through one of them changes the others, although they are different objects.

identity of a tensor  =  device, and the addresses of its elements
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class _Extent(NamedTuple):
    """The range of addresses from a tensor's first element to the end of its last one, gaps included."""

    device: str
    start: int
    end: int
    name: str


def shared_memory(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return the pairs of tensors that are different objects and have elements in common, in the order given.

    Tensors without an address of their own (on the meta device, sparse, lazy, wrapper subclasses) are left out.

    Args:
        tensors: The tensors, by name.

    Example:
        >>> a = torch.zeros(4, 6)
        >>> shared_memory({"a": a, "same object": a, "transposed": a.t(), "copy": a.clone()})
        [('a', 'transposed')]
        >>> shared_memory({"left": a[:, :3], "right": a[:, 3:], "both": a[:2]})
        [('left', 'both'), ('right', 'both')]
    """
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_names.setdefault(id(tensor), name)
    extents = [found for name in first_names.values() if (found := _extent(name, tensors[name])) is not None]
    order = {name: place for place, name in enumerate(tensors)}
    pairs = []
    reaching: list[_Extent] = []  # earlier ones that may overlap the next one
    for extent in sorted(extents):
        reaching = [one for one in reaching if one.device == extent.device and one.end > extent.start]
        for one in reaching:
            if _have_common_elements(tensors[one.name], one, tensors[extent.name], extent):
                pairs.append(sorted((one.name, extent.name), key=order.__getitem__))
        reaching.append(extent)
    pairs.sort(key=lambda pair: (order[pair[0]], order[pair[1]]))
    return [(first, second) for first, second in pairs]


def refuse_shared_memory(module: nn.Module, names: Collection[str]) -> None:
    """Raise a ValueError if a parameter that a technique changes shares its memory with another trained parameter.

    One Parameter object under several names is allowed.

    Args:
        module: The network.
        names: The qualified names of the parameters that the technique changes.
    """
    parameters = dict(module.named_parameters())
    for pair in shared_memory(parameters):
        if not any(name in names for name in pair):
            continue
        if all(name in names or parameters[name].requires_grad for name in pair):
            first, second = pair
            raise ValueError(
                f"{first} {tuple(parameters[first].shape)} and {second} {tuple(parameters[second].shape)} of "
                f"{type(module).__name__} are two Parameters over one memory, so that a change of one would change "
                f"the other too: expected one Parameter for one memory. Assign the same Parameter to both modules "
                f"where the shapes are equal, compute a transposed or sliced one in forward (F.linear(x, weight.t())), "
                f"or untie them with nn.Parameter({second}.detach().clone())."
            )


def _extent(name: str, tensor: Tensor) -> _Extent | None:
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return None
    start = tensor.data_ptr()
    if start == 0:  # a wrapper subclass
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Extent(str(tensor.device), start, start + (last + 1) * tensor.element_size(), name)


def _have_common_elements(a: Tensor, at_a: _Extent, b: Tensor, at_b: _Extent) -> bool:
    """Whether two tensors with overlapping extents have elements in common; columns side by side have none."""
    if all(one.numel() * one.element_size() == at.end - at.start for one, at in ((a, at_a), (b, at_b))):
        return True  # neither has gaps
    unit = gcd(a.element_size(), b.element_size(), at_b.start - at_a.start)
    low, high = min(at_a.start, at_b.start), max(at_a.end, at_b.end)
    marked = torch.zeros((high - low) // unit, dtype=torch.bool)
    _elements(marked, a, at_a.start - low, unit).fill_(True)
    return bool(_elements(marked, b, at_b.start - low, unit).any())


def _elements(marked: Tensor, tensor: Tensor, offset: int, unit: int) -> Tensor:
    """View the marks of a tensor's elements; each mark stands for `unit` bytes."""
    pieces = tensor.element_size() // unit
    shape = [
        size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]  # once for expanded dimensions
    strides = [stride * pieces for stride in tensor.stride()]
    return marked.as_strided((*shape, pieces), (*strides, 1), offset // unit)
