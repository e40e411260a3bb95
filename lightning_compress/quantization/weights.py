"""Quantized weights for a training loop: the passes use values on a grid; the optimizer steps latent real weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.latent import LatentWeights
from lightning_compress.core.numbers_by_pattern import numbers_by_name
from lightning_compress.core.tensors import Kept
from lightning_compress.quantization.grids import (
    Granularity,
    by_scale,
    check_bits,
    check_granularity,
    on_symmetric_grid,
    weight_scales,
)


class UniformWeights(LatentWeights):
    """Parameters that hold quantized weights between steps, while the optimizer trains their latent real values.

    The gradient passes straight through, dL/dw = dL/dW~, also for clamped weights. Weights that are exactly zero at the
    start, or that other code sets to zero later, count as pruned: they stay zero. Weights that only round to zero may
    become non-zero again. The scales are computed anew from the real values after each step.

    Args:
        model: The network that holds the parameters.
        bits: The bits of each parameter, 2 to 8, by qualified name. (`quantize_weights` takes patterns.)
        granularity: "channel" for one scale per output channel, "tensor" for one scale per parameter.

    Attributes:
        latent: The real weights by name; zero where a weight is pruned.
        alive: For each parameter with pruned weights, a boolean tensor that is False at these.
        bits: The bits of each parameter, by name.
        scales: The scales of each parameter by name, shaped as `weight_scales` returns them.

    Raises:
        ValueError: An argument is out of range, or a weight is NaN or infinite.

    Example:
        >>> import torch
        >>> net = nn.Linear(3, 1, bias=False)
        >>> net.weight.data = torch.tensor([[1.0, -0.3, 0.0]])
        >>> uniform = UniformWeights(net, {"weight": 2})
        >>> net.weight.data  # -0.3 rounds to 0; the zero is a pruned weight
        tensor([[1., -0., 0.]])
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net(torch.tensor([[1.0, 4.0, 2.0]])).backward()
        >>> uniform.open(); optimizer.step(); uniform.close()
        >>> net.weight.data, uniform.latent["weight"]
        (tensor([[ 0.8000, -0.8000,  0.0000]]), tensor([[ 0.9000, -0.7000,  0.0000]]))
    """

    def __init__(self, model: nn.Module, bits: Mapping[str, int], *, granularity: Granularity = "channel") -> None:
        for one in bits.values():
            check_bits("weight_bits", one)
        check_granularity(granularity)
        self.bits = dict(bits)
        self.granularity: Granularity = granularity
        self.scales: dict[str, Tensor] = {}
        super().__init__(model, list(bits))

    def value(self, name: str, real: Tensor) -> Tensor:
        return on_symmetric_grid(real, self.scales[name].to(real.device), self.bits[name], **self._how(name))

    @property
    def mean_bits(self) -> float:
        """The mean number of bits per weight, scales not counted."""
        count = sum(latent.numel() for latent in self.latent.values())
        return sum(self.bits[name] * latent.numel() for name, latent in self.latent.items()) / count

    def clipped(self) -> float:
        """Return the fraction of the real weights that lie beyond the grid by more than half a step."""
        count = 0
        for name, latent in self.latent.items():
            bound = (2 ** (self.bits[name] - 1) - 0.5) * self.scales[name]
            count += int((by_scale(latent.abs().contiguous(), **self._how(name)) > bound).sum())
        return count / sum(latent.numel() for latent in self.latent.values())

    def zeros(self) -> float:
        """Return the fraction of the weights that are zero, pruned or rounded."""
        zeros = sum(p.numel() - int(p.count_nonzero()) for p in self.parameters.values())
        return zeros / sum(latent.numel() for latent in self.latent.values())

    def _slice(self, model: nn.Module, kept: Kept) -> None:
        for name, latent in self.latent.items():  # scales in the parameter's shape are sliced like the parameter
            whole = by_scale(latent.contiguous(), **self._how(name))
            self.scales[name] = self.scales[name].expand_as(whole).reshape(latent.shape)
        super()._slice(model, kept)
        for name, scales in self.scales.items():
            self.scales[name] = by_scale(scales.contiguous(), **self._how(name)).amax((1, 3), keepdim=True)

    def _rewritten(self, name: str, changed: Tensor, held: Tensor, expected: Tensor) -> Tensor:
        # If other code wrote all non-zero weights of one scale, it wrote the zeros as well, though they look unchanged:
        # their latent values are out of date.
        kept = ((held != 0) | (expected != 0)) & ~changed
        whole = ~by_scale(kept.contiguous(), **self._how(name)).any(3, keepdim=True).any(1, keepdim=True)
        return changed | whole.expand_as(by_scale(changed.contiguous(), **self._how(name))).reshape(changed.shape)

    def _forget(self, name: str) -> None:
        self.scales.pop(name, None)

    def _renew(self, name: str) -> None:
        self.scales[name] = weight_scales(
            self.latent[name], self.bits[name], last=self.scales.get(name), **self._how(name)
        )

    def _tables(self) -> dict[str, dict[str, Tensor]]:
        return {"scales": self.scales}

    def _how(self, name: str) -> dict[str, Any]:
        return {"granularity": self.granularity, "groups": self._groups.get(name)}


def quantize_weights(
    model: nn.Module,
    bits: int | Mapping[str, int | None] = 8,
    *,
    granularity: Granularity = "channel",
    target: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> UniformWeights:
    """Quantize weights of a model to a few bits, in place: after training, or for a training loop of your own.

    Args:
        model: The network.
        bits: 2 to 8, or `{pattern: bits}`, where the first pattern that matches a layer counts.
        granularity: "channel" or "tensor", as for `UniformWeights`.
        target: Patterns of modules (their `weight`) or parameters; by default every linear layer and convolution.
        exclude: Patterns of what stays real.

    Raises:
        ValueError: An argument is out of range, a weight is NaN or infinite, or the patterns select nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> uniform = quantize_weights(net, {"0": 3, "2": 8})
        >>> len(net[0].weight[0].abs().unique()) <= 4, uniform.mean_bits
        (True, 4.666666666666667)
    """
    by_name = bits_by_name(model, bits, target=target, exclude=exclude)
    return UniformWeights(model, by_name, granularity=granularity)


def bits_by_name(
    model: nn.Module,
    bits: int | Mapping[str, int | None],
    *,
    target: str | Sequence[str] | None = None,
    default: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> dict[str, int]:
    """Return the bits of each parameter that is quantized, by name."""
    names = {"argument": "weight_bits", "done": "quantized", "leaving": "None"}
    return numbers_by_name(model, bits, target=target, default=default, exclude=exclude, **names)
