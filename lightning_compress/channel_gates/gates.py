"""The gates of a network, as a child of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channel_gates.kinds import FeatureGate, Gate, GroupGate, Layer, Way, checked_share, saliency

GATES = "channel_gates"  # the name of a network's child that holds its gates
_VARIES = (0.05, 0.95)  # shares of samples between which a channel counts as one that samples choose differently


class LayerGates(nn.Module):
    """The gates of a network, as its child `channel_gates`: its children are the gates, "1", "2", ... in their order.

    It returns what it is called with, so that a network that runs its children one after another stays as it was.

    Args:
        layers: In the order in which they run.
        share: Of the channels that are kept, above 0 and at most 1.
        orders: For gates that choose groups, by layer the order of its channels; None: they choose single channels.

    Attributes:
        layers: As given.
        orders: As given.
        share: As given; it may be changed. Gates that choose groups keep other shares, by what they have learned.
        training_share: In training mode, the share in the place of `share`; None: there is none.
        explore: In training mode, as for `Gate.choose`.
        way: How channels are chosen, also in the training of a control: see `Gate.choose`.
    """

    def __init__(
        self, layers: Sequence[Layer], share: float, orders: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.share = checked_share(share)
        self.training_share: float | None = None
        self.way: Way = "gates"
        self.orders = None if orders is None else {name: tuple(order) for name, order in orders.items()}
        self.explore = 0.0
        self._seen: list[tuple[Tensor, Tensor]] | None = None
        self._generator = torch.Generator().manual_seed(0)
        self._factors: dict[str, Tensor] = {}  # of layers that have begun, whose ends have not run yet
        for number, layer in enumerate(self.layers, start=1):
            gate = FeatureGate(layer.inputs, layer.channels)
            self.add_module(str(number), gate if orders is None else GroupGate(layer.inputs, orders[layer.name]))

    def __len__(self) -> int:
        return len(self.layers)

    def forward(self, unchanged: Tensor) -> Tensor:
        return unchanged

    def by_layer(self) -> dict[str, Gate]:
        """Return the gates by the names of their layers, in their order."""
        found: dict[str, Any] = {
            layer.name: self.get_submodule(str(number)) for number, layer in enumerate(self.layers, start=1)
        }
        return found

    def reorder(self, orders: Mapping[str, Sequence[int]] | None) -> None:
        """Change the order of channels by which groups are kept, as that of a network that is loaded."""
        if orders is None or self.orders is None:
            return
        self.orders = {name: tuple(order) for name, order in orders.items()}
        for name, gate in self.by_layer().items():
            assert isinstance(gate, GroupGate)
            gate.reorder(self.orders[name])

    def look(self, number: int, x: Tensor) -> None:
        """Choose the channels of layer `number`, counted from 0, by what the layer is about to read."""
        layer, gate = self.layers[number], self.get_submodule(str(number + 1))
        assert isinstance(gate, Gate)
        if self.orders is not None:
            x = x.detach()  # an agent learns from rewards, and the network from its loss
        with torch.autocast(x.device.type, enabled=False):
            scores = gate(saliency(x, last=layer.last))
        scores = scores.detach() if self.way == "random" else scores  # a control's gains stay what they are
        kept = self.choice(gate, scores)
        if self.training:
            gate.count(kept)
            if self._seen is not None:
                self._seen.append((scores, kept))
        self._factors[layer.name] = gate.factors(scores, kept)

    def choice(self, gate: Gate, scores: Tensor) -> Tensor:
        """Return a mask of the channels that samples with these scores keep now."""
        share = self.training_share if self.training and self.training_share is not None else self.share
        return gate.choose(scores, share, self.way, self._generator, self.explore if self.training else 0.0)

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
        """Choose channels in another way while the block runs the network."""
        before, self.way = self.way, way
        self._generator.manual_seed(0)
        try:
            yield
        finally:
            self.way = before

    @contextmanager
    def collecting(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Collect scores and choices of all samples, layer by layer, while the block runs the network in training."""
        found: list[tuple[Tensor, Tensor]] = []
        self._seen = found
        try:
            yield found
        finally:
            self._seen = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_factors": {}, "_seen": None, "_generator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(0)


def gates_of(network: nn.Module) -> LayerGates | None:
    """Return the gates of a network; None if it has none."""
    found = network._modules.get(GATES)
    return found if isinstance(found, LayerGates) else None
