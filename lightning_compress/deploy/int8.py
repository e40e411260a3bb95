"""Weights, biases and outputs as integers in an ONNX graph, so that onnxruntime computes with integers.

    x -> QuantizeLinear -> DequantizeLinear ---.
    int8 weights, scales -> DequantizeLinear ---> Conv -> Relu -> QuantizeLinear -> DequantizeLinear -> ...
    int32 bias, scales -> DequantizeLinear ----'
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import helper, numpy_helper

from lightning_compress.coding.encodings.grid import find_grid
from lightning_compress.quantization.input_grids import InputGrid

Array = np.ndarray[Any, np.dtype[Any]]

_ALONG = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # onnxruntime moves the rounding past
_LARGEST_BIAS = 2.0**30  # half of what an int32 holds; the other half is for the sum of products


class IntegerWeight(NamedTuple):
    """integers times scales, these along one dimension."""

    integers: Array
    scales: Array
    axis: int

    def shaped(self) -> Array:
        """The scales, to multiply the integers."""
        return self.scales.reshape([-1 if dim == self.axis else 1 for dim in range(self.integers.ndim)])


def integer_weight(weight: Array, axis: int) -> IntegerWeight | None:
    """Return the int8 integers and the float32 scales along `axis` whose product is the weight, or None.

    Example:
        >>> found = integer_weight(np.float32([[3, -2], [1, 0]]) * np.float32([[0.1], [0.7]]), 0)
        >>> found.integers.tolist(), found.scales.tolist()
        ([[3, -2], [1, 0]], [0.10000000149011612, 0.699999988079071])
    """
    if weight.dtype != np.float32 or weight.ndim < 2 or not weight.any():
        return None
    rows = np.ascontiguousarray(np.moveaxis(weight, axis, 0))
    starts = np.arange(len(rows)) * rows[0].size
    grid = find_grid(rows.reshape(-1).view(np.uint32), torch.float32, starts)
    if grid is None or grid.integers.min() < -128 or grid.integers.max() > 127:
        return None
    scales = grid.scales.view(np.float32).copy()
    scales[scales == 0] = np.abs(scales).max()  # a silent channel's: any other number
    integers = np.moveaxis(grid.integers.astype(np.int8).reshape(rows.shape), 0, axis)
    return IntegerWeight(np.ascontiguousarray(integers), scales, axis)


class Graph:
    """An ONNX graph and who makes and reads what in it; rewriting is done by whole nodes."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.outputs = {one.name for one in self.graph.output}
        self.initializers = {one.name: one for one in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)

    def value(self, name: str) -> Array | None:
        """Return a constant's value, or None."""
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Constant":
            kept = {one.name: one for one in maker.attribute}
            value: Array = numpy_helper.to_array(kept["value"].t) if "value" in kept else np.float32(kept["value_float"].f)
            return value
        return numpy_helper.to_array(self.initializers[name]) if name in self.initializers else None

    def step(self, name: str) -> float | None:
        """Return the scale of a tensor that was just dequantized, or None."""
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return None
        scale = self.value(maker.input[1])
        return float(scale) if scale is not None and scale.size == 1 else None

    def replace_initializer(self, name: str, integers: Array, scales: Array, axis: int) -> None:
        """Have integers and scales in the place of a float tensor, which is now computed from them."""
        self.graph.initializer.remove(self.initializers[name])
        zeros = np.zeros(len(scales), integers.dtype)  # onnxruntime wants them said
        parts = self._constants(name, integers=integers, scales=scales, zero_points=zeros)
        self.graph.node.insert(0, helper.make_node("DequantizeLinear", parts, [name], axis=axis))

    def round_output(self, name: str, grid: InputGrid) -> None:
        """Have all readers of a tensor read its points on a grid: one that some read already, or else this one."""
        readers, maker = self.readers[name], self.makers[name]
        known = [node for node in readers if node.op_type == "QuantizeLinear" and self._is_plain(node)]
        if known:
            pair = [known[0], self.readers[known[0].output[0]][0]]
            for node in pair:
                self.graph.node.remove(node)
        else:
            parts = self._constants(name, scale=np.float32(grid.scale), zero_point=np.uint8(grid.zero_point))
            pair = [
                helper.make_node("QuantizeLinear", [name, *parts], [f"{name}.q"]),
                helper.make_node("DequantizeLinear", [f"{name}.q", *parts], [f"{name}.dq"]),
            ]
        place = 1 + list(self.graph.node).index(maker)
        for node in reversed(pair):
            self.graph.node.insert(place, node)
        for reader in readers:
            if reader not in known[:1]:
                reader.input[:] = [pair[1].output[0] if one == name else one for one in reader.input]

    def _is_plain(self, quantizer: Any) -> bool:
        """Whether nothing clips between QuantizeLinear and DequantizeLinear."""
        return [node.op_type for node in self.readers[quantizer.output[0]]] == ["DequantizeLinear"]

    def _constants(self, name: str, **values: Any) -> list[str]:
        names = [f"{name}.{key}" for key in values]
        self.graph.initializer.extend(map(numpy_helper.from_array, map(np.asarray, values.values()), names))
        return names


def quantize_weights(model: Any) -> set[str]:
    """Write weights that are on a grid as int8, and the biases beside them, where inputs are quantized, as int32.

    Returns:
        The names of the initializers that are int8 now.
    """
    graph, done = Graph(model), set()
    for name in list(graph.initializers):
        readers = graph.readers[name]
        axes = {_channels(node, name) for node in readers}
        if len(axes) != 1 or None in axes:
            continue
        weight = integer_weight(graph.value(name), axes.pop())
        if weight is None:
            continue
        biases: dict[str, tuple[Array, float]] = {}
        for node in readers:
            step = graph.step(node.input[0])
            bias = node.input[2] if len(node.input) > 2 else ""
            value = graph.value(bias) if bias and len(graph.readers[bias]) == 1 else None
            if step is not None and value is not None:
                biases[bias] = value, step
                weight = _with_room(weight, value, step)
        graph.replace_initializer(name, *weight)
        for bias, (value, step) in biases.items():
            scales = weight.scales * np.float32(step)
            graph.replace_initializer(bias, np.rint(value / scales.astype(np.float64)).astype(np.int32), scales, 0)
        done.add(name)
    return done


def float_outputs(model: Any) -> list[str]:
    """Return what keeps onnxruntime from computing with integers although all that goes in is rounded.

    Outputs of convolutions that nothing rounds, and of additions of such; not the network's own outputs.
    """
    graph, found = Graph(model), []
    for node in graph.graph.node:
        if node.op_type not in ("Conv", "Add"):
            continue
        if not all(name in found or graph.step(name) is not None for name in node.input[: 2 if node.op_type == "Add" else 1]):
            continue
        if node.op_type == "Conv" and node.input[1] not in graph.makers:
            continue
        name = node.output[0]
        if [one.op_type for one in graph.readers[name]] in (["Relu"], ["Clip"]):
            name = graph.readers[name][0].output[0]
        if name not in graph.outputs and not _is_rounded(graph, name):
            found.append(name)
    return found


def _is_rounded(graph: Graph, name: str) -> bool:
    readers = graph.readers[name]
    return name not in graph.outputs and all(
        node.op_type == "QuantizeLinear" or (node.op_type in _ALONG and _is_rounded(graph, node.output[0]))
        for node in readers
    )


def _channels(node: Any, weight: str) -> int | None:
    """The dimension of a weight that output channels are in, where the node reads it as one."""
    if len(node.input) < 2 or list(node.input).index(weight) != 1:
        return None
    attributes = {one.name: one.i for one in node.attribute}
    if node.op_type == "ConvTranspose":
        return 1 if attributes.get("group", 1) == 1 else None
    return {"Conv": 0, "MatMul": 1, "Gemm": 1 - attributes.get("transB", 0)}.get(node.op_type)


def _with_room(weight: IntegerWeight, bias: Array, step: float) -> IntegerWeight:
    """The weight on a coarser grid in those channels whose bias, in units of the products, would not fit an int32."""
    least = (np.abs(bias) / (step * _LARGEST_BIAS)).astype(np.float32)
    if (weight.scales >= least).all():
        return weight
    coarse = weight._replace(scales=np.maximum(weight.scales, least))
    integers = np.rint(weight.integers * (weight.shaped() / coarse.shaped())).astype(np.int8)
    return coarse._replace(integers=integers)
