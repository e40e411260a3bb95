"""Networks with widths for use without training: one width alone, for good, or all of them with `width=`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups
from lightning_compress.core.answering import put
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.input_hooks import settle_inputs
from lightning_compress.slimmable.norms import norms_or_raise, take_norms, way_at
from lightning_compress.slimmable.switch import find_groups, fresh, thin_of
from lightning_compress.slimmable.widths import Width, counts_at, masks_of


@torch.inference_mode(False)
def extract(network: nn.Module, width: Width, example_inputs: ExampleInputs) -> nn.Module:
    """Return a copy of a network for one width: of the user's class, with this width's channels and statistics alone.

    It is what `cut` makes: `save_compressed`, `load_compressed` and ONNX take it, and its state dicts say what was cut.

    Args:
        network: Has widths (see `give_norms`); it stays as it is.
        width: Of every free group, or by group name; 1.0: the full network without its widths.
        example_inputs: As for `channel_groups`.

    Raises:
        ValueError: The network has no widths, or its norms have no statistics for this one.

    Example:
        >>> from lightning_compress.slimmable.norms import give_norms
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.zeros(2, 3)
        >>> _ = give_norms(net, channel_groups(net, x), [0.25, 0.5])
        >>> extract(net, 0.25, x)
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    held = norms_or_raise(network)
    if width != 1.0 and held.groups is not None:
        thin_of(network, width)  # refuses what has no statistics
    found = copy.deepcopy(network)
    put(found, None)
    settle_inputs(found, "" if width == 1.0 else way_at(width))
    take_norms(found)
    if width == 1.0:
        return found
    groups = channel_groups(found, example_inputs)
    masks = masks_of(groups, counts_at(groups, width, allow_inexact=held.allow_inexact))
    keep = {name: mask.nonzero().squeeze(1) for name, mask in masks.items()}
    cut(found, example_inputs, keep=keep, groups=groups, allow_inexact=held.allow_inexact)
    with torch.no_grad():
        for path, norm in held.of(width).items():
            mine = found.get_submodule(path)
            for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
                getattr(mine, name).copy_(tensor)
    return found


class SlimmableNetwork(nn.Module):
    """A copy of a network that runs at any of its widths; for evaluation.

    Each width that has run keeps copies of those numbers that are no contiguous view of the full network's.

    Args:
        network: Has widths (see `give_norms`).
        example_inputs: Where the network's channel groups are not known, because it was loaded from a file.

    Attributes:
        widths: Those at which it has statistics, ascending; a network without norms runs at others as well.
        network: The copy.

    Raises:
        ValueError: The network has no widths, or its groups are not known.

    Example:
        >>> from lightning_compress.slimmable.norms import give_norms
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = give_norms(net, channel_groups(net, torch.zeros(2, 3)), [0.25, 0.5])
        >>> slim = SlimmableNetwork(net)
        >>> slim.widths, slim(torch.zeros(5, 3), width=0.25).shape
        ((0.25, 0.5, 1.0), torch.Size([5, 2]))
    """

    def __init__(self, network: nn.Module, example_inputs: ExampleInputs | None = None) -> None:
        super().__init__()
        self.widths = norms_or_raise(network).widths
        self.network = copy.deepcopy(network)
        put(self.network, None)
        norms_or_raise(self.network).contiguous = True
        if example_inputs is not None:
            find_groups(self.network, example_inputs)
        for width in self.widths[:-1]:
            thin_of(self.network, width)
        self.eval()

    def forward(self, *args: Any, width: Width = 1.0, **kwargs: Any) -> Any:
        """Return the network's output at a width.

        Args:
            *args: Of the network.
            width: Of every free group, or by group name.
            **kwargs: Of the network.
        """
        if width == 1.0:
            return self.network(*args, **kwargs)
        return fresh(self.network, width)(*args, **kwargs)
