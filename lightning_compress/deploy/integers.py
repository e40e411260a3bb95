"""Splits quantized weights into integers and scales, as an ONNX file stores them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lightning_compress.coding.encodings.grid import find_grid
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.select import WEIGHT_LAYERS
from lightning_compress.deploy.folding import fold_batch_norm

Array = np.ndarray[Any, np.dtype[Any]]

_LARGEST_BIAS = 2.0**30  # half of the range of int32; the sum of products needs the other half


class IntegerWeight(NamedTuple):
    """A weight as int8 integers times float32 scales.

    Attributes:
        integers: The integers, in the shape of the weight.
        scales: The scales, one per index of dimension `axis`.
        axis: The dimension of the output channels.
    """

    integers: Array
    scales: Array
    axis: int

    def with_room(self, bias: Array, step: float) -> IntegerWeight:
        """Return the weight with larger scales in channels whose bias, in units of step times scale, overflows int32.

        The rounding error is negligible, because the products of such a channel are tiny compared with its bias.

        Args:
            bias: The bias of the layer.
            step: The scale of the layer's input.
        """
        least = (np.abs(bias) / (step * _LARGEST_BIAS)).astype(np.float32)
        if (self.scales >= least).all():
            return self
        coarse = np.maximum(self.scales, least)
        shape = [-1 if dim == self.axis else 1 for dim in range(self.integers.ndim)]
        integers = np.rint(self.integers * (self.scales / coarse).reshape(shape))
        return IntegerWeight(integers.astype(np.int8), coarse, self.axis)


def integer_weight(weight: Array, axis: int) -> IntegerWeight | None:
    """Return int8 integers and scales along `axis` whose product is the weight bit for bit, or None.

    Args:
        weight: The weight; for dtypes other than float32 the result is None.
        axis: The dimension of the output channels.

    Example:
        >>> found = integer_weight(np.float32([[3, -2], [1, 0]]) * np.float32([[0.5], [0.75]]), 0)
        >>> found.integers.tolist(), found.scales.tolist()
        ([[3, -2], [1, 0]], [0.5, 0.75])
    """
    if weight.dtype != np.float32 or weight.ndim < 2 or not weight.any():
        return None
    rows = np.array(np.moveaxis(weight, axis, 0), order="C")
    grid = find_grid(rows.reshape(-1).view(np.uint32), torch.float32, np.arange(len(rows)) * rows[0].size)
    if grid is None or grid.integers.min() < -128 or grid.integers.max() > 127:
        return None
    scales = grid.scales.view(np.float32).copy()
    scales[scales == 0] = scales.max()  # for channels of zeros any scale is right
    integers = np.moveaxis(grid.integers.astype(np.int8).reshape(rows.shape), 0, axis)
    return IntegerWeight(np.ascontiguousarray(integers), scales, axis)


def fold_quantized(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """Fold the batch norms of a quantized network, in place; its weights stay integers times scales.

    A network without quantized weights is not changed.

    Args:
        model: The network, on the CPU.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments; batch first.

    Returns:
        The model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
        >>> type(fold_quantized(net, torch.ones(1, 2))[1]).__name__
        'BatchNorm1d'
        >>> net[0].weight.data = torch.tensor([[0.5, -1.0], [0.25, 0.75]])
        >>> fold_quantized(net, torch.ones(1, 2))[1]
        Identity()
    """
    scales = {}
    for name, layer in model.named_modules():
        parameter = layer._parameters.get("weight")
        if not isinstance(layer, WEIGHT_LAYERS) or parameter is None:
            continue
        weight, axis = parameter.detach().numpy(), 0
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            weight, axis = (
                np.concatenate(np.split(weight, layer.groups), 1),
                1,
            )  # dim 1 then has all output channels, group by group
        found = integer_weight(weight, axis)
        if found is not None:
            scales[name] = torch.from_numpy(found.scales)
    return fold_batch_norm(model, example_inputs, scales=scales) if scales else model
