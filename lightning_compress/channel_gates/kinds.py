"""Gates of one layer: small modules that choose, for each sample, which channels of the layer's output are kept.

s = mean |x|               of each input channel of the layer

FeatureGate                g = relu(W s + b); the ceil(d C) channels with the largest g are kept, times g
GroupGate                  q = V relu(U s + u) + v; the first i of k groups of channels are kept, with the largest q_i
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.given import real_number

Train = Literal["gradient", "q_learning"]
Way = Literal["gates", "random", "static"]
GROUPS = 4  # of a layer's channels, for gates that choose groups
_ROUNDING = 1e-9  # 0.7 * 10 is a little more than 7
_MOMENTUM = 0.02  # of the running share of samples that keep a channel
_HIDDEN = 16  # units of a gate that chooses groups


@dataclass(frozen=True)
class Layer:
    """A layer whose output channels are chosen for each sample.

    Attributes:
        name: Qualified name of the convolution or linear layer.
        end: Name of the module whose output is multiplied: the layer's own, or that of the batch norm that follows it.
        inputs: Number of its input channels.
        channels: Number of its output channels.
        last: Whether channels are the last dimension, as of a linear layer, and not the second one.
    """

    name: str
    end: str
    inputs: int
    channels: int
    last: bool


def count_at(share: float, channels: int) -> int:
    """Return how many of a layer's channels a share of them is: ceil(share * channels), at least one.

    Example:
        >>> count_at(0.7, 10), count_at(0.5, 7), count_at(0.01, 8)
        (7, 4, 1)
    """
    return max(1, math.ceil(share * channels - _ROUNDING))


def largest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` largest scores of each row; of equal ones the first are taken, on every device.

    Example:
        >>> largest(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), 1)
        tensor([[False,  True, False, False]])
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


def saliency(x: Tensor, *, last: bool) -> Tensor:
    """Return the mean absolute value of each channel of each sample, in float32 or better.

    Example:
        >>> saliency(torch.tensor([[[1.0, -3.0], [0.0, 0.0]]]), last=False)
        tensor([[2., 0.]])
    """
    x = x.abs() if x.dtype is torch.float64 else x.abs().float()
    if x.dim() == 2:
        return x
    return x.flatten(1, -2).mean(1) if last else x.flatten(2).mean(2)


class Gate(nn.Module):
    """A gate of one layer. A subclass supplies `forward`, `choose` and `factors`.

    Attributes:
        used: Running share of the training samples that keep each channel.
    """

    used: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("used", torch.ones(channels))

    def forward(self, s: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the scores by which each sample chooses.

        Args:
            s: Mean absolute values of the input channels.
            positions: The input channels that `s` has, where it lacks those that are 0.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply forward().")

    def choose(self, scores: Tensor, share: float, way: Way, generator: torch.Generator, explore: float) -> Tensor:
        """Return a mask of the channels that each sample keeps.

        Args:
            scores: As `forward` returns them.
            share: Of the channels that are kept.
            way: "gates": by the scores; "random": any, as many; "static": those that training kept most often.
            generator: For random ones, on the CPU.
            explore: The share of samples that choose at random, for gates that learn by trying.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply choose().")

    def factors(self, scores: Tensor, kept: Tensor) -> Tensor:
        """Return by what each sample's channels are multiplied."""
        raise NotImplementedError(f"{type(self).__name__} must supply factors().")

    @torch.no_grad()
    def count(self, kept: Tensor) -> None:
        """Update the running shares with the channels that the samples of a training batch keep."""
        self.used.lerp_(kept.to(self.used.dtype).mean(0), _MOMENTUM)


class FeatureGate(Gate):
    """The gains of a layer's channels, from the mean absolute values of what it reads: relu(W s + b).

    At first W is 0 and b is 1, so that all gains are 1, and the layer's output stays as it is. Each sample keeps as
    many channels: those with the largest gains, each times the magnitude of its channel.

    Args:
        inputs: Number of the layer's input channels.
        channels: Number of its output channels.

    Attributes:
        magnitude: Of each output channel, by which gains are compared; it stays as it is. The paper's gains are in the
            place of a norm's scale, and so compared with it.

    Shapes:
        input (N, inputs), output (N, channels).

    Paper:
        Gao et al., Dynamic channel pruning: feature boosting and suppression (1810.05331), equations 5 to 9.

    Example:
        >>> FeatureGate(2, 3)(torch.rand(1, 2))
        tensor([[1., 1., 1.]], grad_fn=<ReluBackward0>)
    """

    magnitude: Tensor

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.zeros(channels, inputs))
        self.bias = nn.Parameter(torch.ones(channels))
        self.register_buffer("magnitude", torch.ones(channels))

    def forward(self, s: Tensor, positions: Tensor | None = None) -> Tensor:
        return torch.relu(_linear(s, self.weight, self.bias, positions))

    def choose(self, scores: Tensor, share: float, way: Way, generator: torch.Generator, explore: float) -> Tensor:
        count = count_at(share, scores.shape[1])
        if way == "random":
            return largest(torch.rand(scores.shape, generator=generator), count).to(scores.device)
        if way == "static":
            return largest(self.used.float()[None], count).expand_as(scores)
        return largest(scores.detach() * self.magnitude.to(scores.dtype), count)

    def factors(self, scores: Tensor, kept: Tensor) -> Tensor:
        return scores * kept


class GroupGate(Gate):
    """The values of keeping the first 1, 2, ..., k groups of a layer's channels, as an agent expects them.

    At first all groups have the largest value, so that the layer's output stays as it is.

    Args:
        inputs: Number of the layer's input channels.
        order: The layer's output channels, the first group's first.

    Attributes:
        order: As given.
        group: By output channel the number of its group, from 0.

    Shapes:
        input (N, inputs), output (N, k).

    Paper:
        Lin et al., Runtime neural pruning (2017). Its agent also remembers its earlier choices; this one does not.

    Example:
        >>> gate = GroupGate(2, [3, 0, 1, 2, 7, 6, 5, 4])
        >>> gate.group.tolist(), int(gate(torch.rand(1, 2)).argmax())
        ([0, 1, 1, 0, 3, 3, 2, 2], 3)
    """

    group: Tensor

    def __init__(self, inputs: int, order: Sequence[int]) -> None:
        super().__init__(len(order))
        groups = min(GROUPS, len(order))
        self.register_buffer("group", torch.zeros(len(order), dtype=torch.long), persistent=False)
        self.reorder(order)
        own = torch.Generator().manual_seed(0)  # the network's random draws stay what they are
        self.hidden_weight = nn.Parameter(torch.randn(_HIDDEN, inputs, generator=own) / inputs**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(_HIDDEN))
        self.value_weight = nn.Parameter(torch.zeros(groups, _HIDDEN))
        self.value_bias = nn.Parameter(torch.tensor([0.0] * (groups - 1) + [0.1]))

    def reorder(self, order: Sequence[int]) -> None:
        """Take another order of the channels."""
        size = len(order)
        self.order = tuple(order)
        self.group[torch.tensor(self.order)] = (torch.arange(size) * min(GROUPS, size) // size).to(self.group.device)

    def forward(self, s: Tensor, positions: Tensor | None = None) -> Tensor:
        hidden = torch.relu(_linear(s, self.hidden_weight, self.hidden_bias, positions))
        return _linear(hidden, self.value_weight, self.value_bias)

    def choose(self, scores: Tensor, share: float, way: Way, generator: torch.Generator, explore: float) -> Tensor:
        last = scores.argmax(1)
        if explore > 0.0:  # draws from the global generator, whose state a checkpoint of a fit has
            tries = torch.rand(len(scores), device=scores.device) < explore
            last = torch.where(tries, torch.randint_like(last, scores.shape[1]), last)
        if way != "gates":
            first = [self.order[i] for i in range(len(self.order)) if i == 0 or self._begins(i)]
            rates = self.used[first].float()  # of samples that keep each group
            drawn = torch.full((len(scores),), 0.5) if way == "static" else torch.rand(len(scores), generator=generator)
            last = (drawn.to(rates.device)[:, None] < rates).sum(1).sub(1).clamp(min=0)
        return self.group <= last[:, None]

    def _begins(self, place: int) -> bool:
        return bool(self.group[self.order[place]] != self.group[self.order[place - 1]])

    def factors(self, scores: Tensor, kept: Tensor) -> Tensor:
        return kept.to(scores.dtype)

    def chosen(self, kept: Tensor) -> Tensor:
        """Return the number of the last group that each sample keeps, from 0."""
        return torch.where(kept, self.group, 0).amax(1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None = None) -> Tensor:
    weight = weight if positions is None else weight.index_select(1, positions)
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def checked_share(share: float) -> float:
    """Return a share of channels.

    Raises:
        ValueError: It is none above 0 and at most 1.
    """
    return real_number(share, "share says how many channels each sample keeps, above 0 and at most 1", above=0, most=1)
