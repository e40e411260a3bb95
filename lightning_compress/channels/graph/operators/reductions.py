"""Reductions and pooling: operators that sum, average or combine neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lightning_compress.channels.graph.operators.call import Call, rule
from lightning_compress.channels.graph.operators.elementwise import combine
from lightning_compress.channels.graph.units import Layer, Value

_EXACT_SUMS = {"sum", "linalg_vector_norm", "norm", "any"}
_SPREADS = {"var", "std", "var_mean", "std_mean"}


@rule(
    "sum mean amax amin max min var std var_mean std_mean prod norm linalg_vector_norm logsumexp argmax argmin any all "
    "median nansum"
)
def reduce(call: Call) -> Any:
    source: Value = call["self"]
    shapes = call.shape if isinstance(call.shape, list) else [call.shape]
    other = call["other"]
    if isinstance(other, Value):
        return combine(call, [source, other], lambda states: all(states) and len(states) == 2)
    given = call["dim"]
    rank = len(source.shape)
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    dims = [dim % rank for dim in dims] if rank else []
    keepdim = bool(call["keepdim"])
    layers = []
    for layer in source.layers:
        reduced = [dim for dim in layer.dims if dim in dims]
        if reduced and len(reduced) < len(layer.dims):
            call.freeze([layer], f"{call.where} mixes channels with places")
        elif reduced:
            if call.name in _SPREADS and _one_would_be_left(call, source, layer, dims):
                call.freeze([layer], f"{call.where} needs more than one value, and one would be left")
            if not (call.name in _EXACT_SUMS and layer.silent):
                for dim in reduced:
                    call.inexact("self", dim, [layer], f"{call.where} averages over channels")
        else:
            nodes = layer.nodes
            if not keepdim:
                nodes = nodes.reshape([size for dim, size in enumerate(nodes.shape) if dim not in dims])
            layers.append(Layer(nodes, layer.silent and call.name not in ("logsumexp", "argmax", "argmin", "all")))
    results = [Value(tuple(shape), tuple(layers)) for shape in shapes]
    return results if isinstance(call.shape, list) else results[0]


def _one_would_be_left(call: Call, source: Value, layer: Layer, dims: Sequence[int]) -> bool:
    """Return whether a single channel is a single value, of which the unbiased variance is not a number."""
    divides_by_less = call["unbiased"] is not False and call["correction"] != 0  # neither is given: n - 1
    values = math.prod(source.shape[dim] for dim in dims)
    return divides_by_less and torch.unique(layer.nodes).numel() == values


@rule("softmax log_softmax _softmax _log_softmax")
def softmax(call: Call) -> Value:
    source: Value = call["self"]
    dim = call["dim"] % len(source.shape)
    call.inexact("self", dim, source.along(dim), f"{call.where} divides by a sum over channels")
    return Value(source.shape, tuple(Layer(layer.nodes, dim in layer.dims) for layer in source.layers))


def _over_places(call: Call, source: Value, first: int) -> Any:
    layers = []
    for layer in source.layers:
        if any(dim >= first for dim in layer.dims):
            call.freeze([layer], f"{call.where} mixes neighbours, and its neighbours are channels")
        else:
            layers.append(layer)
    shapes = call.shape if isinstance(call.shape, list) else [call.shape]
    found = [Value(tuple(shape), tuple(layers), source.uniform, source.parameter) for shape in shapes]
    return found if isinstance(call.shape, list) else found[0]


@rule(
    " ".join(
        f"max_pool{n}d avg_pool{n}d adaptive_avg_pool{n}d adaptive_max_pool{n}d max_pool{n}d_with_indices "
        f"lp_pool{n}d reflection_pad{n}d replication_pad{n}d upsample_nearest{n}d _upsample_nearest_exact{n}d "
        f"upsample_linear{n}d"
        for n in (1, 2, 3)
    )
    + " upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
def places(call: Call) -> Any:
    source: Value = call[next(name for name in ("self", "input") if isinstance(call[name], Value))]
    digits = [int(letter) for letter in call.name if letter in "123"]
    return _over_places(call, source, len(source.shape) - digits[0])


@rule("grid_sampler grid_sampler_2d grid_sampler_3d")
def grid(call: Call) -> Any:
    call.freeze(call["grid"].layers, f"{call.where} reads places from channels")
    return _over_places(call, call["input"], 2)
