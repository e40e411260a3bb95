"""The modules of gates: what they read of a block's input, and the logits that they make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.precision import widened

OPEN = 3.0  # the logit of every gate before training
_SPEED = math.sqrt(10.0)  # of the logits: their gradient and its effect grow by it, so that SGD's learning rate is x 10
_HIDDEN = 16  # units of a gate of its own block
_STATE = 10  # units of the recurrent gate, as in SkipNet
_CHANNELS = (8, 16)  # of the two convolutions of a policy
_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True)
class Features:
    """The shape of what a gate reads.

    Args:
        dims: How many dimensions the tensor has, with that of the samples.
        axis: That of the channels.
        channels: How many.
    """

    dims: int
    axis: int
    channels: int

    def pooled(self, x: Tensor) -> Tensor:
        """Return the mean of each channel, (N, channels)."""
        others = [dim for dim in range(1, self.dims) if dim != self.axis]
        return x.mean(others) if others else x


class BlockGate(nn.Module):
    """A gate of one block: the means of its channels, a hidden layer, one logit.

    Args:
        features: What it reads.

    Shapes:
        input (N, ...), output (N,).

    Paper:
        Veit and Belongie, ConvNet-AIG (1711.11503), section 3.2, here with a layer norm, which also works for a single
        sample, in the place of batch norm.
    """

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        self.hidden = nn.Linear(features.channels, _HIDDEN)
        self.norm = nn.LayerNorm(_HIDDEN)
        self.logit = _opening(_HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.hidden(self.features.pooled(x))).relu()
        return _SPEED * widened(self.logit(hidden)).squeeze(1)


class PolicyGate(nn.Module):
    """A gate that looks once, and decides for all blocks.

    Feature maps pass two strided convolutions and are averaged; other inputs are averaged and pass a hidden layer.

    Args:
        features: What it reads.
        blocks: How many blocks it decides for.

    Shapes:
        input (N, ...), output (N, blocks).

    Paper:
        Wu et al., BlockDrop (1711.08393), section 3.2.
    """

    def __init__(self, features: Features, blocks: int) -> None:
        super().__init__()
        self.features = features
        first, last = _CHANNELS
        if features.axis == 1 and features.dims in _CONVOLUTIONS:
            kind: Any = _CONVOLUTIONS[features.dims]
            self.looks = nn.Sequential(
                kind(features.channels, first, 3, stride=2, padding=1),
                nn.ReLU(),
                kind(first, last, 3, stride=2, padding=1),
            )
            self.sees = Features(features.dims, 1, last)
        else:
            self.looks = nn.Sequential()
            self.sees = features
        self.hidden = nn.Linear(self.sees.channels, _HIDDEN)
        self.norm = nn.LayerNorm(_HIDDEN)
        self.logit = _opening(_HIDDEN, blocks)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.sees.pooled(self.looks(x))
        return _SPEED * widened(self.logit(self.norm(self.hidden(pooled)).relu()))


class RecurrentGate(nn.Module):
    """One gate for all blocks, which remembers what it has read before earlier ones; only its bias is of each block.

    Args:
        features: What it reads, for each block.

    Paper:
        Wang et al., SkipNet (1711.09485), section 3.1, "RNNGate".
    """

    def __init__(self, features: Sequence[Features]) -> None:
        super().__init__()
        self.features = tuple(features)
        self.reads = nn.ModuleList(nn.Linear(one.channels, _STATE) for one in features)
        self.cell = nn.LSTMCell(_STATE, _STATE)
        self.logit = nn.Linear(_STATE, 1, bias=False)
        self.bias = nn.Parameter(torch.full((len(features),), OPEN / _SPEED))
        nn.init.zeros_(self.logit.weight)

    def forward(self, k: int, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = self.cell(self.reads[k](self.features[k].pooled(x)), state)
        return _SPEED * widened(self.logit(h).squeeze(1) + self.bias[k]), (h, c)


def _opening(units: int, logits: int) -> nn.Linear:
    """Return the last layer of gates that are all open, whatever they read."""
    layer = nn.Linear(units, logits)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, OPEN / _SPEED)
    return layer
