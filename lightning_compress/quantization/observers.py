"""Ranges of what layers see in training, as moving averages, and the grids that follow from them.

    low  <- a low  + (1 - a) (smallest entry of the step's inputs, or 0)        a: smoothing; the first step begins
    high <- a high + (1 - a) (largest entry, or 0)
    grid:   `affine(low, high, bits)`

A step's inputs are those of all its micro-batches on all ranks, of layers in training mode or with gradients.
Jacob et al. 2018 (1712.05877), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.core.input_hooks import InputHooks
from lightning_compress.quantization.input_grids import InputQuantizer, affine


class ObservingQuantizer(InputQuantizer):
    """Puts inputs on a grid, and remembers the range of what it sees in training."""

    def __init__(self, bits: int = 8) -> None:
        super().__init__(bits)
        self.observes = True
        self.seen: Tensor | None = None  # -low and high since the last update

    def change(self, layer: nn.Module, x: Tensor) -> Tensor:
        trains = layer.training or torch.is_grad_enabled()  # a network may be trained in evaluation mode
        if self.observes and trains and x.numel() and not torch.compiler.is_compiling():
            low, high = x.detach().float().aminmax()
            seen = torch.stack([-low, high])
            self.seen = seen if self.seen is None else torch.maximum(self.seen, seen)
        return super().change(layer, x)


class ObservedInputs(InputHooks):
    """Inputs of layers on grids that follow their ranges, by hooks on the user's own layers.

    Args:
        model: The network.
        names: The layers, by qualified name.
        bits: Of the grids.
        smoothing: How much of its range a layer keeps at an update.

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
        self.ranges = torch.full((len(names), 2), torch.nan, device=device)  # low and high; NaN before the first update
        self._strange = torch.zeros(len(names), dtype=torch.bool, device=device)
        super().__init__(names, [handle for name in names for handle in self.hooks[name].attach(layers[name])])

    def seen(self) -> Tensor:
        """Return -low and high of each layer since the last time, for a maximum over ranks; -inf where it has not run.

        NaN counts as infinite.
        """
        rows = []
        for hook in self.hooks.values():
            nothing = self.ranges.new_full((2,), -torch.inf)
            rows.append(nothing if hook.seen is None else hook.seen.nan_to_num(torch.inf, torch.inf))
            hook.seen = None
        return torch.stack(rows)

    def update(self, seen: Tensor) -> None:
        """Move the ranges towards what was seen, and the grids with them."""
        self._strange |= seen.isposinf().any(1)
        new = torch.stack([-seen[:, 0], seen[:, 1]], 1)
        new = torch.stack([new[:, 0].clamp(max=0), new[:, 1].clamp(min=0)], 1)
        moved = torch.where(self.ranges.isnan(), new, torch.lerp(new, self.ranges, self.smoothing))
        self.ranges = torch.where(seen.isfinite().all(1, keepdim=True), moved, self.ranges)
        self._set()

    def check_finite(self) -> None:
        """Raise a ValueError where an input was NaN or infinite: no range holds it."""
        for name in [name for name, strange in zip(self.names, self._strange.tolist(), strict=True) if strange]:
            raise ValueError(f"NaN or infinite: inputs of {name} were, so that no grid covers them.")

    def unseen(self) -> list[str]:
        """Return the layers that have not run in training, whose inputs therefore have no grid."""
        return [name for name, low in zip(self.names, self.ranges[:, 0].tolist(), strict=True) if low != low]

    def observe(self, on: bool) -> None:
        """Have the ranges follow what the layers see in training from now on, or no more."""
        for hook in self.hooks.values():
            hook.observes, hook.seen = on, None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the ranges by layer."""
        return dict(zip(self.names, self.ranges.clone(), strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ranges of these layers; others begin anew."""
        for row, name in enumerate(self.names):
            if name in state:
                self.ranges[row] = state[name]
        self._set()

    def _set(self) -> None:
        scales, zero_points = affine(self.ranges[:, 0], self.ranges[:, 1], self.bits)
        known = (~self.ranges[:, 0].isnan()).tolist()
        for row, hook in enumerate(self.hooks.values()):
            hook.scale, hook.zero_point = (scales[row], zero_points[row]) if known[row] else (None, None)
