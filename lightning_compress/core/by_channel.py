"""Views of weights by output channel, whichever dimension of the weight holds the output channels."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_compress.core.select import output_blocks


def transposed_groups(model: nn.Module) -> dict[str, int]:
    """Return the number of blocks of every weight whose output channels lie in dim 1, by name of the weight.

    Transposed convolutions have such weights, in as many blocks as they have `groups`.

    Example:
        >>> transposed_groups(nn.Sequential(nn.Linear(2, 2), nn.ConvTranspose1d(4, 6, 3, groups=2)))
        {'1.weight': 2}
    """
    found = {f"{name}.weight" if name else "weight": output_blocks(module) for name, module in model.named_modules()}
    return {name: blocks for name, blocks in found.items() if blocks is not None}


def by_channel(tensor: Tensor, groups: int | None = None) -> Tensor:
    """View a contiguous weight in four dimensions, of which 1 and 3 run over the entries of one output channel.

    Args:
        tensor: A weight. A vector counts as one channel.
        groups: The `groups` of a transposed convolution; None for a weight whose output channels lie in dim 0.

    Example:
        >>> import torch
        >>> by_channel(torch.zeros(8, 4, 3, 3)).shape, by_channel(torch.zeros(8, 4, 3, 3), 2).shape
        (torch.Size([8, 36, 1, 1]), torch.Size([2, 4, 4, 9]))
    """
    if groups is not None:
        return tensor.view(groups, tensor.shape[0] // groups, tensor.shape[1], -1)
    return tensor.view(tensor.shape[0] if tensor.dim() > 1 else 1, -1, 1, 1)
