"""Gates of channels: small modules that choose, for each sample, which channels of a layer's output are kept.

s = mean |x|           of each input channel of the layer
g = relu(W s + b)      the gain of each output channel
y' = g y               for the ceil(d C) channels with the largest gains; 0 for the others
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

GATES = "channel_gates"  # the name of a network's child that holds its gates
Way = Literal["gates", "random", "static"]
_ROUNDING = 1e-9  # 0.7 * 10 is a little more than 7
_MOMENTUM = 0.02  # of the running share of samples that keep a channel
_VARIES = (0.05, 0.95)  # shares of samples between which a channel counts as one that samples choose differently


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


class FeatureGate(nn.Module):
    """The gains of a layer's channels, from the mean absolute values of what it reads: relu(W s + b).

    At first W is 0 and b is 1, so that all gains are 1, and the layer's output stays as it is.

    Args:
        inputs: Number of the layer's input channels.
        channels: Number of its output channels.

    Attributes:
        used: Running share of the training samples that keep each channel.

    Shapes:
        input (N, inputs), output (N, channels).

    Paper:
        Gao et al., Dynamic channel pruning: feature boosting and suppression (1810.05331), equations 5 to 9.

    Example:
        >>> FeatureGate(2, 3)(torch.rand(1, 2))
        tensor([[1., 1., 1.]], grad_fn=<ReluBackward0>)
    """

    used: Tensor
    scale: Tensor  # of a deployed network: of the channels, with the norm in it
    shift: Tensor

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, inputs))
        self.bias = nn.Parameter(torch.ones(channels))
        self.register_buffer("used", torch.ones(channels))

    def forward(self, s: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(s, self.weight.to(s.dtype), self.bias.to(s.dtype)))

    def choose(self, gains: Tensor, share: float, way: Way, generator: torch.Generator) -> Tensor:
        """Return a mask of the channels that each sample keeps: as many for each.

        Args:
            gains: Of each sample and channel.
            share: Of the channels that are kept.
            way: "gates": the largest gains; "random": any; "static": those that training kept most often.
            generator: For random ones, on the CPU.
        """
        count = count_at(share, gains.shape[1])
        if way == "random":
            drawn = torch.rand(gains.shape, generator=generator)
            return largest(drawn, count).to(gains.device)
        if way == "static":
            return largest(self.used.float()[None], count).expand_as(gains)
        return largest(gains.detach(), count)

    @torch.no_grad()
    def count(self, kept: Tensor) -> None:
        """Update the running shares with the channels that the samples of a training batch keep."""
        self.used.lerp_(kept.to(self.used.dtype).mean(0), _MOMENTUM)


class LayerGates(nn.Module):
    """The gates of a network, as its child `channel_gates`: its children are the gates, "1", "2", ... in their order.

    It returns what it is called with, so that a network that runs its children one after another stays as it was.

    Args:
        layers: In the order in which they run.
        share: Of the channels that are kept, above 0 and below 1.

    Attributes:
        layers: As given.
        share: As given; it may be changed.
        training_share: In training mode, the share in the place of `share`; None: there is none.
        way: How channels are chosen in evaluation: see `FeatureGate.choose`.
        gains: Gets the gains of each gate that runs, in training; None: nobody wants them.
    """

    def __init__(self, layers: Sequence[Layer], share: float) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.share = checked_share(share)
        self.training_share: float | None = None
        self.way: Way = "gates"
        self.gains: list[Tensor] | None = None
        self._generator = torch.Generator().manual_seed(0)
        self._factors: dict[str, Tensor] = {}  # of layers that have begun, whose ends have not run yet
        for number, layer in enumerate(self.layers, start=1):
            self.add_module(str(number), FeatureGate(layer.inputs, layer.channels))

    def __len__(self) -> int:
        return len(self.layers)

    def forward(self, unchanged: Tensor) -> Tensor:
        return unchanged

    def by_layer(self) -> dict[str, FeatureGate]:
        """Return the gates by the names of their layers, in their order."""
        found: dict[str, Any] = {
            layer.name: self.get_submodule(str(number)) for number, layer in enumerate(self.layers, start=1)
        }
        return found

    def kept(self, layer: Layer) -> int:
        """Return how many channels of a layer each sample keeps in evaluation."""
        return count_at(self.share, layer.channels)

    def look(self, number: int, x: Tensor) -> None:
        """Choose the channels of layer `number`, counted from 0, by what the layer is about to read."""
        layer, gate = self.layers[number], self.get_submodule(str(number + 1))
        assert isinstance(gate, FeatureGate)
        with torch.autocast(x.device.type, enabled=False):
            gains = gate(saliency(x, last=layer.last))
        if not self.training:
            kept = gate.choose(gains, self.share, self.way, self._generator)
        else:
            share = self.share if self.training_share is None else self.training_share
            kept = gate.choose(gains, share, "gates", self._generator)
            gate.count(kept)
            if self.gains is not None:
                self.gains.append(gains)
        self._factors[layer.name] = gains * kept

    def apply_to(self, number: int, output: Tensor) -> Tensor:
        """Return the output of the end of layer `number` with the gains of its channels in it."""
        layer = self.layers[number]
        factors = self._factors.pop(layer.name, None)
        if factors is None:
            raise ValueError(
                f"{layer.end!r} ran, and {layer.name!r} before it did not, so that its channels were not chosen: name "
                f"other layers in ChannelGates(layers=[...])."
            )
        between = [1] * (output.dim() - 2)
        shape = (len(factors), *between, layer.channels) if layer.last else (len(factors), layer.channels, *between)
        return output * factors.to(output.dtype).view(shape)

    def varying(self) -> float:
        """Return the share of channels that some training samples keep and others do not."""
        used = torch.cat([gate.used.float() for gate in self.by_layer().values()])
        return float(((used > _VARIES[0]) & (used < _VARIES[1])).float().mean())

    @contextmanager
    def running(self, way: Way) -> Iterator[None]:
        """Choose channels in another way while the block evaluates the network."""
        before, self.way = self.way, way
        self._generator.manual_seed(0)
        try:
            yield
        finally:
            self.way = before

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """Collect the gains of all samples while the block runs the network in training."""
        found: list[Tensor] = []
        self.gains = found
        try:
            yield found
        finally:
            self.gains = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_factors": {}, "gains": None, "_generator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(0)


def checked_share(share: float) -> float:
    """Return a share of channels.

    Raises:
        ValueError: It is none above 0 and at most 1.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise ValueError(f"share says how many channels each sample keeps, above 0 and at most 1; got {share!r}.")
    return float(share)


def gates_of(network: nn.Module) -> LayerGates | None:
    """Return the gates of a network; None if it has none."""
    found = network._modules.get(GATES)
    return found if isinstance(found, LayerGates) else None
