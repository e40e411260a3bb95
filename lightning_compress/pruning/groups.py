"""What a neuron is: one output channel of a layer, and the slices of tensors that belong to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one tensor that belong to the channels of a layer.

    `index` has shape (size, k): row i holds the k positions along `dim` of `tensor` (a qualified name, such as
    `"conv.weight"`) that are channel i.
    """

    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class Neurons:
    """The output channels of one layer: `size` units, each a slice of every member.

    `name` is the layer's qualified name; the first member is its weight. `frozen` is None, or says in words why
    none of these channels may be removed.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str | None = None


def channel_sums(score: Tensor, member: Member) -> Tensor:
    """Sum, for every channel, the entries of `score` that belong to it: shape (size,).

    `score` has the shape of the member's tensor.

    Example:
        >>> import torch
        >>> score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> channel_sums(score, Member("fc.weight", dim=0, index=torch.tensor([[0], [1]])))
        tensor([3., 7.])
        >>> channel_sums(score, Member("fc.weight", dim=0, index=torch.tensor([[0, 1]])))  # one unit of two rows
        tensor([10.])
    """
    positions = score.movedim(member.dim, 0).flatten(1).sum(1) if score.dim() > 1 else score
    return positions[member.index.to(score.device)].sum(1)
