"""The nuclear norm, a penalty under which networks train towards low rank: the sum of a matrix's singular values.

    prox    W <- U max(S - t, 0) V^T    for W = U S V^T

which minimises 0.5 |V - W|^2 + t * (sum of the singular values of V) over all V: small singular values become zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.core.select import output_blocks, select_parameters


class Shrunk(NamedTuple):
    """A matrix after the proximal step, the number of its singular values above zero, and that of all."""

    weight: Tensor
    left: int
    most: int


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """A weight as the matrix by which its layer multiplies: one row for each output, and one matrix for each group.

    Attributes:
        parameter: The weight.
        blocks: The number of equal blocks along its first dimension, such as the groups of a convolution.
        transposed: Whether outputs are the second dimension of each block, as in transposed convolutions.
    """

    parameter: nn.Parameter
    blocks: int = 1
    transposed: bool = False

    @torch.no_grad()
    def shrunk(self, threshold: float) -> Shrunk:
        """Return the weight with all singular values smaller by a threshold, and none below zero."""
        weight = self.parameter.detach()
        blocks = torch.unflatten(weight, 0, (self.blocks, -1))
        ordered = blocks.transpose(1, 2) if self.transposed else blocks
        matrices = ordered.flatten(2)
        exact = matrices.float() if matrices.dtype in (torch.float16, torch.bfloat16) else matrices
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        s = (s - threshold).clamp(min=0)
        thin = ((u * s[:, None, :]) @ vh).to(weight.dtype).view(ordered.shape)
        back = (thin.transpose(1, 2) if self.transposed else thin).reshape(weight.shape)
        return Shrunk(back, int((s > 0).sum()), s.numel())


def weight_matrices(
    model: nn.Module, *, target: str | Sequence[str] | None = None, exclude: str | Sequence[str] = ()
) -> dict[str, WeightMatrix]:
    """Return targeted weights as matrices, by name: a convolution's has a row for each filter, in each of its groups.

    Args:
        model: The network.
        target: Patterns of modules (their `weight`) or parameters; by default every linear layer and convolution.
        exclude: Patterns to leave out.

    Raises:
        ValueError: No parameter is left, or one is a vector, which has no rank.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 10))
        >>> {name: (one.blocks, one.shrunk(0.0).most) for name, one in weight_matrices(net).items()}
        {'0.weight': (2, 8), '2.weight': (1, 10)}
    """
    owners = {id(p): module for module in model.modules() for p in module._parameters.values() if p is not None}
    found = {}
    for name, parameter in select_parameters(model, target, exclude=exclude).items():
        if parameter.dim() < 2:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}: a vector has no rank. Leave it out of target={target!r}."
            )
        owner = owners[id(parameter)]
        transposed = output_blocks(owner)
        groups = owner.groups if isinstance(owner, nn.modules.conv._ConvNd) else 1
        found[name] = WeightMatrix(parameter, transposed or groups, transposed is not None)
    return found


@torch.no_grad()
def shrink_ranks(matrices: dict[str, WeightMatrix], threshold: float) -> float:
    """Make the singular values of weights smaller by a threshold, and return the share of them that is above zero.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
        >>> shrink_ranks(weight_matrices(layer), 1.0)
        0.5
        >>> layer.weight.data
        tensor([[2., 0.],
                [0., 0.]])
    """
    found = [(one.parameter, one.shrunk(threshold)) for one in matrices.values()]
    for parameter, shrunk in found:
        parameter.copy_(shrunk.weight)
    return sum(one.left for _, one in found) / max(1, sum(one.most for _, one in found))
