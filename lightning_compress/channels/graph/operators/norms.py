"""Norms: a cut is exact for norms over the batch, and inexact for norms over channels, which count them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_compress.channels.graph.operators.call import Call, blank, rule
from lightning_compress.channels.graph.operators.elementwise import broadcast_at, combine
from lightning_compress.channels.graph.units import Layer, Value


@rule("batch_norm instance_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm")
def batch_norm(call: Call) -> Any:
    x: Value = call["input"]
    affine = [call[name] for name in ("weight", "bias") if call[name] is not None]
    state = [call[name] for name in ("running_mean", "running_var") if call[name] is not None]
    for value in state:
        call.units.consumed += [layer.nodes for layer in value.layers]
    vectors = [broadcast_at(value, 1, len(x.shape)) for value in affine + state]
    # With statistics of the input itself a silent channel stays silent; running statistics may shift it.
    own_mean = not state and True in (call["use_input_stats"], call["training"])
    averaged = [
        layer for layer in x.layers if own_mean and 1 not in layer.dims
    ]  # the weight of a layer that standardises it
    for layer in averaged:
        if torch.unique(layer.nodes).numel() * x.shape[1] == math.prod(x.shape):
            call.freeze([layer], f"{call.where} needs more than one value per channel, and one would be left")
        for dim in layer.dims:
            call.inexact("input", dim, [layer], f"{call.where} averages over channels")

    def silent(states: Sequence[bool]) -> bool:
        return len(affine) == 2 or (own_mean and call["bias"] is None and states[0])

    x = replace(x, layers=tuple(layer for layer in x.layers if layer not in averaged))
    result = combine(call, [x, *vectors], silent)
    result = replace(result, layers=(*result.layers, *(Layer(layer.nodes, True) for layer in averaged)))
    if not affine:
        _note_attribute(call, "num_features", x.along(1))
    if isinstance(call.shape, list):
        return [result, *(blank(shape) for shape in call.shape[1:])]
    return result


@rule("_weight_norm")
def weight_norm(call: Call) -> Value:
    """Return the labels of g * v / |v|: g alone makes a channel zero, because zeros in place of v have no direction."""
    v, dim = call["v"], call["dim"] or 0
    if dim >= 0:  # else the norm is that of all of v
        call.units.consumed += [layer.nodes for layer in v.along(dim)]
    return replace(combine(call, [v, call["g"]], any), parameter=False)  # zeros where a channel is read change the norm


@rule("layer_norm rms_norm")
def layer_norm(call: Call) -> Value:
    x: Value = call["input"]
    shape = call["normalized_shape"]
    affine = [call[name] for name in ("weight", "bias") if call[name] is not None]
    over = range(len(x.shape) - len(shape), len(x.shape))
    for dim in over:
        call.inexact("input", dim, x.along(dim), f"{call.where} averages over channels")
        _note_attribute(call, "normalized_shape", x.along(dim), dim - over[0])
    full = len(affine) == 2
    result = combine(call, [x, *affine], lambda states: full if call.name == "layer_norm" else any(states))
    layers = []
    for layer in result.layers:
        inside = any(dim in over for dim in layer.dims)
        layers.append(layer if inside else Layer(layer.nodes, not affine and layer.silent))
    return Value(result.shape, tuple(layers))


@rule("group_norm")
def group_norm(call: Call) -> Value:
    x: Value = call["input"]
    groups = call["num_groups"]
    affine = [call[name] for name in ("weight", "bias") if call[name] is not None]
    each = x.shape[1] // groups
    whole = each == 1 or (
        groups > 1 and call.axis_order > 0
    )  # either whole groups can leave, or channels of every group
    layers = []
    for layer in x.layers:
        if 1 not in layer.dims:
            call.freeze([layer], f"{call.where} averages over places that are channels")
            continue
        call.units.read = True
        nodes = torch.unflatten(layer.nodes, 1, (groups, each))
        first = nodes.narrow(2 if whole else 1, 0, 1)
        call.units.tie(nodes, first, f"{call.where} has groups of one size")
        if whole:
            _note_attribute(call, "num_groups", [Layer(first, True)])
        else:
            call.inexact("input", 1, [layer], f"{call.where} averages over the channels of a group")
        layers.append(Layer(first.expand(nodes.shape).flatten(1, 2), layer.silent))
    _note_attribute(call, "num_channels", [Layer(layer.nodes, True) for layer in layers])
    x = Value(x.shape, tuple(layers))
    vectors = [broadcast_at(value, 1, len(x.shape)) for value in affine]
    return combine(call, [x, *vectors], lambda states: len(affine) == 2 or (whole and not affine and states[0]))


def _note_attribute(call: Call, name: str, layers: Sequence[Layer], place: int | None = None) -> None:
    for layer in layers:
        call.units.attributes.append((call.module, name, place, layer.nodes.reshape(-1)))
