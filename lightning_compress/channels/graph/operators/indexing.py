"""Operators that look entries up, or write them, at places that a tensor of indices names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_compress.channels.graph.operators.call import Call, rule, values_in
from lightning_compress.channels.graph.operators.elementwise import combine
from lightning_compress.channels.graph.units import Layer, Value, compress


@rule("index_add")
def index_add(call: Call) -> Value:
    dim = call["dim"] % len(call.shape)
    return _written(call, [call["self"], call["source"]], lambda place: place == dim)


@rule("index_put")
def index_put(call: Call) -> Value:
    places = list(call["indices"])
    leading = len(places)
    if any(place is None for place in places):
        raise ValueError("it names places behind others that it does not name")
    for value in values_in(places):
        call.freeze(value.layers, f"{call.where} looks places up")
    return _written(call, [call["self"], call["values"]], lambda place: place < leading)


def _written(call: Call, parts: list[Value], places: Callable[[int], bool]) -> Value:
    """Tie written values to the tensor that they are written into, except along the dimensions of places."""
    rank, flat = len(call.shape), []
    for value in parts:
        ahead = rank - len(value.shape)  # values may have fewer dimensions, or several for the places
        shape, layers = [1] * rank, []
        for dim, size in enumerate(value.shape):
            if ahead + dim >= 0 and not places(ahead + dim):
                shape[ahead + dim] = size
        for layer in value.layers:
            if all(ahead + dim >= 0 and not places(ahead + dim) for dim in layer.dims):
                here = layer.nodes.reshape([layer.nodes.shape[dim] for dim in range(max(-ahead, 0), len(value.shape))])
                layers.append(Layer(here.reshape([1] * max(ahead, 0) + list(here.shape)), layer.silent))
            else:
                call.freeze([layer], f"{call.where} looks rows up by their number")
        flat.append(Value(tuple(shape), tuple(layers), value.uniform, value.parameter, zero=value.zero))
    result = combine(call, flat, all)
    return Value(tuple(call.shape), result.layers, result.uniform, result.parameter, zero=result.zero)


@rule("index_select gather take_along_dim cumsum cumprod sort topk argsort log_cumsum_exp")
def along_dim(call: Call) -> Any:
    source: Value = call["self"]
    dim = (-1 if call["dim"] is None else call["dim"]) % max(len(source.shape), 1)
    others = [value for value in values_in(call.arguments) if value is not source]
    for value in others:
        call.freeze(value.layers, f"{call.where} looks places up")
    call.freeze(source.along(dim), f"{call.where} tells channels apart by their place")
    layers = tuple(layer for layer in source.layers if dim not in layer.dims)
    keeps = call.name in ("index_select", "cumsum", "sort", "topk")
    shapes = call.shape if isinstance(call.shape, list) else [call.shape]
    found = [Value(tuple(shape), tuple(Layer(one.nodes, one.silent and keeps) for one in layers)) for shape in shapes]
    return found if isinstance(call.shape, list) else found[0]


@rule("index")
def index(call: Call) -> Value:
    source: Value = call["self"]
    places = list(call["indices"])
    for value in values_in(places):
        call.freeze(value.layers, f"{call.where} looks places up")
    looked_up = [dim for dim, place in enumerate(places) if place is not None]
    zeros = [None if place is None else torch.zeros(place.shape, dtype=torch.long) for place in places]
    layers = []
    for layer in source.layers:
        if any(dim in layer.dims for dim in looked_up):
            call.freeze([layer], f"{call.where} looks rows up by their number")
        else:
            nodes = compress(torch.ops.aten.index(layer.nodes.expand(source.shape), zeros))
            layers.append(Layer(nodes, layer.silent))
    return Value(tuple(call.shape), tuple(layers), source.uniform, source.parameter, zero=source.zero)


@rule("embedding")
def embedding(call: Call) -> Value:
    weight: Value = call["weight"]
    call.freeze(weight.along(0), f"{call.where} looks rows up by their number")
    call.units.consumed += [layer.nodes for layer in weight.along(0)]
    for value in values_in(call["indices"]):
        call.freeze(value.layers, f"{call.where} looks rows up by channels")
    layers = []
    for layer in weight.along(1):
        call.units.produced.append(layer.nodes)
        layers.append(Layer(layer.nodes.reshape([1] * (len(call.shape) - 1) + [-1]), layer.silent))
    return Value(tuple(call.shape), tuple(layers))
