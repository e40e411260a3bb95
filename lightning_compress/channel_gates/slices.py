"""Forwards of layers that compute, and read, some channels alone; they stand in the place of the layers' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.channel_gates.gates import LayerGates
from lightning_compress.channel_gates.kinds import Gate, Layer, saliency


class SlicedLayer:
    """The forward of a gated layer, whose weight and bias do what the norm at its end did as well.

    Args:
        network: Has the layer.
        layer: Which.
        gates: Of the network.
        thin: Whether the network's code and the layers that follow run with the chosen channels alone.

    Attributes:
        slices: Whether it computes the chosen channels alone for one sample.
        in_sets: Whether it computes a batch by sets of channels.
        kept: The channels that it has computed last; None: all.
        feed: What it reads that was chosen before.
    """

    def __init__(self, network: nn.Module, layer: Layer, gates: LayerGates, *, thin: bool) -> None:
        self.layer, self.gates, self.thin = layer, gates, thin
        self.module: Any = network.get_submodule(layer.name)
        self.gate: Gate = gates.by_layer()[layer.name]
        self.slices, self.in_sets = True, True
        self.kept: Tensor | None = None
        self.feed: Feed | None = None
        norm: Any = network.get_submodule(layer.end) if layer.end != layer.name else None
        if norm is not None:
            _fold(self.module, norm)
            vars(norm)["forward"] = _unchanged
        vars(self.module)["forward"] = self

    def __call__(self, input: Tensor) -> Tensor:
        x, feed = input, None if self.feed is None else self.feed.positions()
        scores = self.gate(saliency(x, last=self.layer.last), feed)
        mask = self.gates.choice(self.gate, scores)
        factors = self.gate.factors(scores, mask)
        if len(x) == 1 and self.slices:
            return self._one(x, factors[0], mask[0], feed)
        self.kept = None
        if self.in_sets and len(x) > 1:
            return self._sets(x, factors, mask)
        return self._times(_computed(self.module, x, self._weight(None, feed), self.module.bias), factors)

    def _one(self, x: Tensor, factors: Tensor, mask: Tensor, feed: Tensor | None) -> Tensor:
        kept = mask.nonzero().squeeze(1)
        factors = factors.index_select(0, kept).to(x.dtype)
        weight, bias = self._weight(kept, feed), self.module.bias
        weight = weight * factors.view(-1, *[1] * (weight.dim() - 1))
        thin = _computed(self.module, x, weight, None if bias is None else bias.index_select(0, kept) * factors)
        self.kept = kept if self.thin else None
        return thin if self.thin else self._scattered(thin, kept)

    def _sets(self, x: Tensor, factors: Tensor, mask: Tensor) -> Tensor:
        """Compute the samples that have chosen the same channels together."""
        sets, of_sample = torch.unique(mask, dim=0, return_inverse=True)
        output: Tensor | None = None
        for number, chosen in enumerate(sets):
            rows, kept = (of_sample == number).nonzero().squeeze(1), chosen.nonzero().squeeze(1)
            bias = None if self.module.bias is None else self.module.bias.index_select(0, kept)
            thin = _computed(self.module, x.index_select(0, rows), self._weight(kept, None), bias)
            full = self._scattered(thin, kept)
            if output is None:
                output = full.new_zeros(len(x), *full.shape[1:])
            output.index_copy_(0, rows, full)
        assert output is not None
        return self._times(output, factors)

    def _times(self, output: Tensor, factors: Tensor) -> Tensor:
        between = [1] * (output.dim() - 2)
        shape = (len(factors), *between, -1) if self.layer.last else (len(factors), -1, *between)
        return output * factors.to(output.dtype).view(shape)

    def _scattered(self, thin: Tensor, kept: Tensor) -> Tensor:
        dim = thin.dim() - 1 if self.layer.last else 1
        shape = list(thin.shape)
        shape[dim] = self.layer.channels
        return thin.new_zeros(shape).index_copy_(dim, kept, thin)

    def _weight(self, kept: Tensor | None, feed: Tensor | None) -> Tensor:
        weight: Tensor = self.module.weight
        weight = weight if kept is None else weight.index_select(0, kept)
        return weight if feed is None else weight.index_select(1, feed)


class ReadingLayer:
    """The forward of a layer without gates that reads chosen channels."""

    def __init__(self, module: nn.Module, feed: Feed) -> None:
        self.module: Any = module
        self.feed = feed

    def __call__(self, input: Tensor) -> Tensor:
        positions, weight = self.feed.positions(), self.module.weight
        if positions is not None:
            weight = weight.index_select(1, positions)
        return _computed(self.module, input, weight, self.module.bias)


class Feed:
    """The positions that a layer reads, of those along the second dimension of its weight.

    Args:
        sources: Layers that choose, with the positions of their channels.
        size: How many positions there are.
    """

    def __init__(self, sources: Sequence[tuple[SlicedLayer, Tensor]], size: int) -> None:
        self.sources, self.size = list(sources), size
        _, index = self.sources[0]
        self._ordered = len(sources) == 1 and torch.equal(index.reshape(-1), torch.arange(size))

    def positions(self) -> Tensor | None:
        """Return the positions that were computed, ascending; None: all."""
        if all(source.kept is None for source, _ in self.sources):
            return None
        if self._ordered:
            source, index = self.sources[0]
            assert source.kept is not None
            return source.kept if index.shape[1] == 1 else index.to(source.kept.device)[source.kept].reshape(-1)
        there: Tensor | None = None
        for source, index in self.sources:
            if source.kept is not None:
                there = torch.ones(self.size, dtype=torch.bool, device=source.kept.device) if there is None else there
                mine = index.to(there.device)
                there[mine.reshape(-1)] = False
                there[mine[source.kept].reshape(-1)] = True
        assert there is not None
        return there.nonzero().squeeze(1)


def _unchanged(input: Tensor) -> Tensor:
    return input


def _computed(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a convolution or linear layer computes with another weight and bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    found: Tensor = module._conv_forward(x, weight, bias)
    return found


@torch.no_grad()
def _fold(module: Any, norm: Any) -> None:
    """Give a layer the weight and bias with which it returns what the batch norm behind it returns in evaluation."""
    if parametrize.is_parametrized(module):
        for name in list(module.parametrizations):
            parametrize.remove_parametrizations(module, name)
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = (0.0 if module.bias is None else module.bias) - norm.running_mean
    weight = module.weight * scale.view(-1, *[1] * (module.weight.dim() - 1))
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    module.register_parameter("weight", nn.Parameter(weight.to(module.weight.dtype)))
    module.register_parameter("bias", nn.Parameter(bias.to(module.weight.dtype)))
