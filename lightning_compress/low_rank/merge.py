"""Multiply the factors of low-rank layers together again."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from lightning_compress.core.undo import as_before_on_error
from lightning_compress.low_rank.forms import LowRankForm
from lightning_compress.replacement.swap import replaced, restore

Network = TypeVar("Network", bound=nn.Module)


def merge(network: Network) -> Network:
    """Make every layer of low rank the dense layer that computes the same, in place; its class is what it was.

    The network gets as large as before, and has the weights that the factors have learned: for code or chips that
    know only the plain layers.

    Raises:
        ValueError: There is none, a cut has taken channels, or an embedding and an output matrix would need the same
            weight. The network is as it was.

    Example:
        >>> from lightning_compress.low_rank.forms import LowRankLinear
        >>> from lightning_compress.replacement.swap import swap
        >>> network = nn.Sequential(nn.Linear(8, 6))
        >>> _ = swap(network[0], LowRankLinear, {"rank": 2})
        >>> merge(network)
        Sequential(
          (0): Linear(in_features=8, out_features=6, bias=True)
        )
    """
    found = {path: one for path, one in replaced(network).items() if isinstance(one, LowRankForm)}
    if not found:
        raise ValueError(f"No layer of {type(network).__name__} is of low rank, so that there is nothing to merge.")
    values: dict[str, tuple[Tensor, Tensor | None]] = {}
    for path, one in found.items():
        if one.shares:
            raise ValueError(
                f"{path or 'the network'} shares its long factor with another layer, and each has a short one of its "
                f"own: no single weight computes both. Leave them as they are, or exclude them from low rank."
            )
        values[path] = weight, _ = one.dense_weight()
        if tuple(weight.shape) != one.was.shape:
            raise ValueError(
                f"{path or 'the network'} had a weight of shape {one.was.shape}, and has the channels of one of shape "
                f"{tuple(weight.shape)} left: merge before channels are cut."
            )
    with as_before_on_error(network):
        for path, one in found.items():
            restore(one, *values[path])
    return network
