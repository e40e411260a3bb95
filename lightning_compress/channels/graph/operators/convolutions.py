"""Convolutions, with and without groups, transposed and not."""

from __future__ import annotations

import torch

from lightning_compress.channels.graph.operators.call import Call, rule
from lightning_compress.channels.graph.operators.contractions import contract
from lightning_compress.channels.graph.operators.elementwise import plus_bias
from lightning_compress.channels.graph.units import FIXED, Layer, Value


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution")
def convolution(call: Call) -> Value:
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"] or 1
    transposed = "transpose" in call.name or bool(call["transposed"])
    n = len(weight.shape) - 2
    batched = "a" if len(x.shape) == n + 2 else ""
    channel = len(batched)
    for layer in (*x.layers, *weight.layers):
        limit = channel if layer in x.layers else 1
        if any(dim > limit for dim in layer.dims) and layer in x.layers:
            call.freeze([layer], f"{call.where} mixes neighbours, and its neighbours are channels")
    x = Value(x.shape, tuple(layer for layer in x.layers if max(layer.dims) <= channel))
    flat_x = Value(x.shape[: channel + 1], tuple(_first(layer, channel + 1) for layer in x.layers))
    kernel = tuple(_first(layer, 2) for layer in weight.layers if max(layer.dims) < 2)
    for layer in weight.layers:
        if max(layer.dims) >= 2:
            call.freeze([layer], f"{call.where} has a kernel of fixed size")
            call.units.consumed.append(layer.nodes)
    flat_w = Value(weight.shape[:2], kernel, False, weight.parameter)
    if groups == 1:
        equation = f"{batched}y,yz->{batched}z" if transposed else f"{batched}y,zy->{batched}z"
        out = contract(call, equation, flat_x, flat_w, arguments=("input", "weight"))
    else:
        out = _grouped(call, flat_x, flat_w, groups, transposed=transposed)
    shape = tuple(call.shape)
    layers = tuple(Layer(layer.nodes.reshape(*layer.nodes.shape, *([1] * n)), layer.silent) for layer in out.layers)
    return plus_bias(call, Value(shape, layers), bias, channel)


def _first(layer: Layer, dims: int) -> Layer:
    return Layer(layer.nodes.reshape(layer.nodes.shape[:dims]), layer.silent)


def _grouped(call: Call, x: Value, weight: Value, groups: int, *, transposed: bool) -> Value:
    """Tie the channels of a grouped convolution: either whole blocks can leave, or the same channels of every block."""
    channel = len(x.shape) - 1
    why = f"{call.where} has groups of one size"
    rows, columns = weight.along(0), weight.along(1)
    if not rows:
        call.freeze(x.layers, f"{call.where} has a weight whose channels are not known")
        return Value((*x.shape[:channel], groups * (weight.shape[1] if transposed else weight.shape[0] // groups)))
    n_in, n_out = x.shape[channel] // groups, (weight.shape[1] if transposed else weight.shape[0] // groups)
    dim_rows = n_in if transposed else n_out  # positions of the weight's first dimension in every block
    blocks = rows[0].nodes.reshape(groups, dim_rows)
    inputs = x.along(channel)
    for layer in x.layers:
        if layer not in inputs:
            call.freeze([layer], f"{call.where} mixes channels with places")
    nodes_in = inputs[0].nodes.reshape(groups, n_in) if inputs else torch.zeros(groups, n_in, dtype=torch.long)
    silent_in = bool(inputs) and inputs[0].silent
    whole = n_in == 1 or call.axis_order > 0
    call.units.read |= n_in > 1
    if whole:
        unit = blocks[:, :1]
        call.units.tie(blocks, unit, why)
        call.units.tie(nodes_in, unit, why)
        for layer in columns:
            call.freeze([layer], f"{call.where}: every group has as many channels")
        call.units.attributes.append((call.module, "groups", None, unit.reshape(-1)))
        out = unit.expand(groups, n_out)
    else:
        side_in = columns[0].nodes.reshape(1, n_in) if columns and not transposed else blocks[:1]
        if transposed:
            call.units.tie(blocks, blocks[:1], why)
            side_in = blocks[:1]
        call.units.tie(nodes_in, side_in, why)
        if not transposed:
            call.units.consumed += [layer.nodes for layer in columns]
            call.units.tie(blocks, blocks[:1], why)
            out = blocks[:1].expand(groups, n_out)
        else:
            call.units.consumed.append(blocks)
            made = columns[0].nodes.reshape(1, n_out) if columns else torch.full((1, n_out), FIXED)
            out = made.expand(groups, n_out)
        if not silent_in:
            for layer in inputs:
                why = f"{call.where} reads channels that are not zero when what makes them is"
                call.inexact("input", channel, [layer], why, zero=True)
    flat = out.reshape(-1)
    shape = (*x.shape[:channel], groups * n_out)
    if len(flat) == 1 or bool((flat == FIXED).all()):
        return Value(shape)
    return Value(shape, (Layer(flat.reshape([1] * channel + [-1]), True),))
