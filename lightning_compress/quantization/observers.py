"""Moving averages of the ranges of layers' inputs in training, and the grids that cover these ranges.

    low  <- a low  + (1 - a) min(0, smallest entry of the step's inputs)        a: smoothing; 0 at the first step
    high <- a high + (1 - a) max(0, largest entry of the step's inputs)
    grid:   `affine(low, high, bits)`

A network that training runs in several ways, as at several widths, has a range and a grid for each of them.

A step's inputs are those of all its micro-batches on all ranks, in training mode or with gradients enabled.
Jacob et al. 2018 (arXiv 1712.05877), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.core.answering import way_of
from lightning_compress.core.input_hooks import InputHooks
from lightning_compress.core.structure import ways_of
from lightning_compress.quantization.input_grids import InputQuantizer, affine


class ObservingQuantizer(InputQuantizer):
    """A hook that quantizes a layer's input and records its range in training.

    Args:
        bits: The bits of the grid.

    Attributes:
        observes: Whether the range is recorded.
        seen: By way of running the network the negated smallest and the largest entry since the last update.
    """

    def __init__(self, bits: int = 8) -> None:
        super().__init__(bits)
        self.observes = True
        self.seen: dict[str, Tensor] = {}

    def change(self, layer: nn.Module, x: Tensor) -> Tensor:
        trains = layer.training or torch.is_grad_enabled()  # a network may be trained in evaluation mode
        if self.observes and trains and x.numel() and not torch.compiler.is_compiling():
            low, high = x.detach().float().aminmax()
            seen = torch.stack([-low, high])
            way = way_of(layer)
            self.seen[way] = torch.maximum(self.seen[way], seen) if way in self.seen else seen
        return super().change(layer, x)


class ObservedInputs(InputHooks):
    """Hooks that quantize the inputs of layers to grids that follow the ranges of these inputs in training.

    Args:
        model: The network.
        names: The qualified names of the layers.
        bits: The bits of the grids.
        smoothing: The factor a of the moving average: how much of its old range a layer keeps at an update.

    Attributes:
        hooks: The hook of each layer, by name.
        ways: Those in which training runs the network; the first one, "", is the network as it is.
        ranges: A row of low and high for each layer in each way, one way after another; NaN before its first update.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> inputs = ObservedInputs(net, ["0"], 2)
        >>> _ = net(torch.tensor([[-1.0], [2.0]])); inputs.update(inputs.seen())
        >>> inputs.ranges, inputs.hooks["0"].grid
        (tensor([[-1.,  2.]]), InputGrid(scale=1.0, zero_point=1, bits=2))
    """

    def __init__(self, model: nn.Module, names: Sequence[str], bits: int, *, smoothing: float = 0.95) -> None:
        self.smoothing = smoothing
        self.bits = bits
        self.hooks = {name: ObservingQuantizer(bits) for name in names}
        layers = {name: model.get_submodule(name) for name in names}
        device = next((parameter.device for layer in layers.values() for parameter in layer.parameters()), None)
        self.ways = ["", *ways_of(model)]
        self._rows = [(way, name) for way in self.ways for name in names]
        self.ranges = torch.full((len(self._rows), 2), torch.nan, device=device)
        self._not_finite = torch.zeros(len(self._rows), dtype=torch.bool, device=device)
        super().__init__(names, [handle for name in names for handle in self.hooks[name].attach(layers[name])])

    def seen(self) -> Tensor:
        """Return -low and high of each layer's inputs since the last call: the maximum over ranks is the joint range.

        A layer that has not run has -inf. NaN counts as infinite.
        """
        nothing = self.ranges.new_full((2,), -torch.inf)
        rows = [
            self.hooks[name].seen.get(way, nothing).nan_to_num(torch.inf, torch.inf, -torch.inf)
            for way, name in self._rows
        ]
        for hook in self.hooks.values():
            hook.seen = {}
        return torch.stack(rows)

    def update(self, seen: Tensor) -> None:
        """Update the moving averages and the grids with a result of `seen`, perhaps reduced over ranks."""
        self._not_finite |= seen.isposinf().any(1)
        new = torch.stack([-seen[:, 0], seen[:, 1]], 1)
        new = torch.stack([new[:, 0].clamp(max=0), new[:, 1].clamp(min=0)], 1)
        moved = torch.where(self.ranges.isnan(), new, torch.lerp(new, self.ranges, self.smoothing))
        self.ranges = torch.where(seen.isfinite().all(1, keepdim=True), moved, self.ranges)
        self._set()

    def check_finite(self) -> None:
        """Raise a ValueError if an input was NaN or infinite, which no grid can represent."""
        found = [name for (_, name), bad in zip(self._rows, self._not_finite.tolist(), strict=True) if bad]
        if found:
            raise ValueError(
                f"Inputs of {', '.join(dict.fromkeys(found))} were NaN or infinite, which no grid can represent: check "
                f"whether the loss diverged."
            )

    def unseen(self) -> list[str]:
        """Return the names of layers that have not run in training, so that their inputs have no grid."""
        return [name for name, low in zip(self.names, self.ranges[:, 0].tolist(), strict=False) if low != low]

    def observe(self, on: bool) -> None:
        """Start or stop recording the ranges of inputs in training."""
        for hook in self.hooks.values():
            hook.observes, hook.seen = on, {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the range of each layer, by name, and those of other ways, by name and way."""
        return dict(zip(map(_key, self._rows), self.ranges.clone(), strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the ranges of the layers that `state` contains, and update the grids."""
        for row, key in enumerate(map(_key, self._rows)):
            if key in state:
                self.ranges[row] = state[key]
        self._set()

    def _set(self) -> None:
        scales, zero_points = affine(self.ranges[:, 0], self.ranges[:, 1], self.bits)
        known = (~self.ranges[:, 0].isnan()).tolist()
        grids = {pair: (scales[row], zero_points[row]) for row, pair in enumerate(self._rows) if known[row]}
        for name, hook in self.hooks.items():
            hook.scale, hook.zero_point = grids.get(("", name), (None, None))
            hook.ways = {way: grids[way, name] for way in self.ways[1:] if (way, name) in grids}


def _key(row: tuple[str, str]) -> str:
    way, name = row
    return f"{name} at {way}" if way else name
