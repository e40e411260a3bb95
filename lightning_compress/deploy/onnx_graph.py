"""Puts integers into an ONNX graph in the form from which onnxruntime chooses integer kernels.

x -> QuantizeLinear -> DequantizeLinear ---.
int8 weights, scales -> DequantizeLinear ---> Conv -> Relu -> QuantizeLinear -> DequantizeLinear -> ...
int32 bias, scales -> DequantizeLinear ----'
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from lightning_compress.deploy.integers import Array, integer_weight
from lightning_compress.quantization.input_grids import InputGrid

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ALONG = (
    "MaxPool",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
)  # onnxruntime moves a QuantizeLinear before these


class Graph:
    """An ONNX graph, with the nodes that make and read each tensor.

    Args:
        model: The ONNX model.

    Attributes:
        graph: The graph of the model.
        outputs: The names of the graph's outputs.
        initializers: The initializers, by name.
        makers: The node that makes each tensor, by the tensor's name.
        readers: The nodes that read each tensor, by the tensor's name.
    """

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
        """Return the value of a tensor, or None if it is not constant."""
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Constant":
            value = helper.get_attribute_value(maker.attribute[0])
            return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
        return numpy_helper.to_array(self.initializers[name]) if name in self.initializers else None

    def step(self, name: str) -> float | None:
        """Return the scale of a tensor that a DequantizeLinear with one scale makes, else None."""
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return None
        scale = self.value(maker.input[1])
        return float(scale) if scale is not None and scale.size == 1 else None

    def replace_initializer(self, name: str, integers: Array, scales: Array, axis: int) -> None:
        """Replace a float initializer by integers and scales, from which a DequantizeLinear computes it."""
        self.graph.initializer.remove(self.initializers[name])
        zeros = np.zeros(len(scales), integers.dtype)  # onnxruntime requires explicit zero points
        parts = self.constants(name, integers=integers, scales=scales, zero_points=zeros)
        self.graph.node.insert(0, helper.make_node("DequantizeLinear", parts, [name], axis=axis))

    def constants(self, name: str, **values: Any) -> list[str]:
        """Add initializers with these values; return their names, which begin with `name`."""
        names = [f"{name}.{key}" for key in values]
        self.graph.initializer.extend(map(numpy_helper.from_array, map(np.asarray, values.values()), names))
        return names


def quantize_weights(model: Any) -> None:
    """Store quantized weights as int8, and the biases of layers with quantized weights and inputs as int32."""
    graph = Graph(model)
    for name in list(graph.initializers):
        readers = graph.readers[name]
        axes = {_channels(node, name) for node in readers}
        axis = axes.pop() if len(axes) == 1 else None
        weight = None if axis is None else integer_weight(numpy_helper.to_array(graph.initializers[name]), axis)
        if weight is None:
            continue
        biases: dict[str, tuple[Array, float]] = {}
        for node in readers:
            step = graph.step(node.input[0])
            bias = node.input[2] if len(node.input) > 2 else ""
            value = graph.value(bias) if bias and len(graph.readers[bias]) == 1 else None
            if step is not None and value is not None:
                biases[bias] = value, step
                weight = weight.with_room(value, step)
        graph.replace_initializer(name, *weight)
        for bias, (value, step) in biases.items():
            scales = weight.scales * np.float32(step)
            graph.replace_initializer(bias, np.rint(value / scales.astype(np.float64)).astype(np.int32), scales, 0)


def float_outputs(model: Any) -> list[str]:
    """Return the names of unrounded outputs that prevent onnxruntime from computing with integers.

    These are outputs of convolutions with quantized weights and inputs, and sums of such or of rounded tensors; not the
    outputs of the network.
    """
    graph, found = Graph(model), []
    for node in graph.graph.node:
        terms = {"Conv": node.input[:1], "Add": node.input}.get(node.op_type)
        if terms is None or any(name not in found and graph.step(name) is None for name in terms):
            continue
        if node.op_type == "Conv" and node.input[1] in graph.initializers:
            continue
        name = node.output[0]
        if [one.op_type for one in graph.readers[name]] in (["Relu"], ["Clip"]):
            name = graph.readers[name][0].output[0]
        if name not in graph.outputs and not _is_rounded(graph, name):
            found.append(name)
    return found


def round_output(model: Any, name: str, grid: InputGrid) -> None:
    """Round a tensor for all its readers: to the grid to which some of them round it already, or else to `grid`."""
    graph = Graph(model)
    readers, nodes = graph.readers[name], graph.graph.node
    pairs = [(one, graph.readers[one.output[0]]) for one in readers if one.op_type == "QuantizeLinear"]
    known = [(one, after[0]) for one, after in pairs if [node.op_type for node in after] == ["DequantizeLinear"]]
    if known:
        pair = known[0]
        for node in pair:
            nodes.remove(node)
    else:
        parts = graph.constants(name, scale=np.float32(grid.scale), zero_point=np.uint8(grid.zero_point))
        quantized, result = f"{name}.quantized", f"{name}.dequantized"
        pair = (
            helper.make_node("QuantizeLinear", [name, *parts], [quantized]),
            helper.make_node("DequantizeLinear", [quantized, *parts], [result]),
        )
    for reader in readers:
        if reader is not pair[0]:
            reader.input[:] = [pair[1].output[0] if one == name else one for one in reader.input]
    place = 1 + list(nodes).index(graph.makers[name])
    for node in reversed(pair):
        nodes.insert(place, node)


def with_outputs(model: Any, names: Sequence[str]) -> Any:
    """Return a copy of a model whose outputs are the named tensors."""
    copy = type(model).FromString(model.SerializeToString())
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return copy


def float_layers(model: Any) -> list[str]:
    """Return the float weights of layers with quantized inputs, as "name (kind of layer)"."""
    graph = Graph(model)
    return [
        f"{node.input[1]} ({node.op_type})"
        for node in graph.graph.node
        if node.op_type in _LAYERS and graph.step(node.input[0]) is not None and node.input[1] in graph.initializers
    ]


def strip(model: Any) -> None:
    """Remove the exporter's metadata, which take half of a small network's file."""
    del model.metadata_props[:]
    for one in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        one.doc_string = ""
        del one.metadata_props[:]
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]


def _is_rounded(graph: Graph, name: str) -> bool:
    readers = graph.readers[name]
    return name not in graph.outputs and all(
        node.op_type == "QuantizeLinear" or (node.op_type in _ALONG and _is_rounded(graph, node.output[0]))
        for node in readers
    )


def _channels(node: Any, weight: str) -> int | None:
    """Return the dimension of the output channels of a weight; None if the node does not read it as a weight."""
    if len(node.input) < 2 or list(node.input).index(weight) != 1:
        return None
    attributes = {one.name: one.i for one in node.attribute}
    if node.op_type == "ConvTranspose":
        return 1 if attributes.get("group", 1) == 1 else None
    return {"Conv": 0, "MatMul": 1, "Gemm": 1 - attributes.get("transB", 0)}.get(node.op_type)
