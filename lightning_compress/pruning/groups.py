"""What a neuron is for pruning: a unit of a channel group, the slices that make it, and the weights that score it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_compress.channels.groups import Member


@dataclass(frozen=True, eq=False)
class Neurons:
    """The channels of one group: `size` units, each a slice of every member.

    Attributes:
        name: The group's name.
        size: How many there are.
        members: The slices that make the channels; with zeros in all of them a channel is silent.
        frozen: None, or why none of them may be removed, in words.
        weights: The slices of layers' weights among them, by which criteria score; by default the first member.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str | None = None
    weights: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        if not self.weights:
            object.__setattr__(self, "weights", self.members[:1])


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
