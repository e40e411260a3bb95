"""Operators that act entry by entry: what they combine is tied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning_compress.core.operators.call import Call, rule, unknown, values_in
from lightning_compress.core.units import Layer, Value, align

_KEEPS_ZERO = (
    "relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish tanh hardswish abs neg sqrt square sign sgn sin tan "
    "asinh atan erf expm1 log1p sinh ceil floor round trunc softshrink hardshrink dropout feature_dropout rrelu "
    "to _to_copy type_as clone contiguous alias detach lift_fresh_copy lift_fresh positive nan_to_num softsign "
    "float double half bfloat16 native_dropout dropout_ _unsafe_view_copy detach_copy"
)
_LOSES_ZERO = (
    "sigmoid hardsigmoid exp exp2 log log2 log10 cos cosh acos softplus log_sigmoid reciprocal rsqrt clamp clamp_min "
    "clamp_max logical_not bitwise_not isnan isinf isfinite eq ne lt le gt ge alpha_dropout feature_alpha_dropout "
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor bitwise_left_shift fmod remainder atan2 "
    "floor_divide threshold erfc digamma lgamma isneginf isposinf __and__ __or__ __xor__"
)


@rule(f"{_KEEPS_ZERO} {_LOSES_ZERO} add sub rsub mul div maximum minimum pow where masked_fill lerp addcmul addcdiv")
def elementwise(call: Call) -> Value:
    operands = values_in(call.arguments)
    silent = _SILENT.get(call.name)
    if silent is None:
        keeps = call.name in _KEEPS_ZERO.split()
        return combine(call, operands, lambda states: keeps and all(states))
    return combine(call, operands, lambda states: silent(call, states))


_SILENT: dict[str, Callable[[Call, list[bool]], bool]] = {
    "add": lambda call, states: all(states) and len(states) == 2,
    "sub": lambda call, states: all(states) and len(states) == 2,
    "rsub": lambda call, states: all(states) and len(states) == 2,
    "maximum": lambda call, states: all(states) and len(states) == 2,
    "minimum": lambda call, states: all(states) and len(states) == 2,
    "mul": lambda call, states: any(states),
    "div": lambda call, states: states[0] and (len(states) == 1 or not states[1]),
    "pow": lambda call, states: states[0] and isinstance(call["exponent"], int | float) and call["exponent"] > 0,
    "where": lambda call, states: all(states[1:]) and len(states) == 3,
    "masked_fill": lambda call, states: states[0] and call["value"] == 0,
    "lerp": lambda call, states: all(states[:2]) and len(states) >= 2,
    "addcmul": lambda call, states: states[0] and any(states[1:]),
    "addcdiv": lambda call, states: all(states[:2]),
}


def combine(call: Call, operands: Sequence[Value], silent: Callable[[list[bool]], bool]) -> Value:
    """Tie operands that are combined entry by entry, with broadcasting.

    `silent` tells whether the result reads zero where the operands that have a channel do (`True` in its list).
    """
    shape = broadcast([value.shape for value in operands])
    layers: list[Layer] = []
    for dim in range(len(shape)):
        here = [_at(value, dim, len(shape)) for value in operands]
        present = [layer for found in here for layer in found]
        if not present or any(layer.dims[0] < dim for layer in present):
            # Nothing varies along this dimension, or its layers were met before.
            call.freeze([one for one in present if one.dims[0] == dim], f"{call.where} mixes channels with places")
            continue
        why = f"{call.where} meets values that are no channels, such as an input, a place or a constant"
        for value, found in zip(operands, here, strict=True):
            own = dim - len(shape) + len(value.shape)
            full = own >= 0 and value.shape[own] > 1 and own not in value.repeated
            if full and not found and not value.uniform:
                call.freeze(present, why)
                break
        else:
            layers.append(_tie(call, here, why, silent))
    parameter = all(value.parameter for value in operands)
    return Value(tuple(shape), tuple(layers), all(value.uniform for value in operands), parameter)


def _tie(call: Call, here: Sequence[Sequence[Layer]], why: str, silent: Callable[[list[bool]], bool]) -> Layer:
    present = [layer for found in here for layer in found]
    kept = min(present, key=lambda layer: layer.nodes.numel())
    for layer in present:
        if layer is not kept:
            call.units.tie(layer.nodes, kept.nodes, why)
    return Layer(kept.nodes, silent([bool(found) and all(layer.silent for layer in found) for found in here]))


def broadcast(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True)
    return [next((size for size in column if size != 1), 1) for column in columns]


def _at(value: Value, dim: int, dims: int) -> list[Layer]:
    """A value's layers along a dimension of the broadcast result."""
    aligned = [Layer(align(layer.nodes, dims), layer.silent) for layer in value.layers]
    return [layer for layer in aligned if dim in layer.dims]


@rule("prelu")
def prelu(call: Call) -> Value:
    x, weight = call["self"], call["weight"]
    if math.prod(weight.shape) == 1:
        return combine(call, [x], all)
    return combine(call, [x, broadcast_at(weight, 1, len(x.shape))], lambda states: states[0])


def broadcast_at(value: Value, dim: int, dims: int) -> Value:
    """A vector, laid along one dimension."""
    shape = [1] * dims
    shape[dim] = value.shape[0]
    layers = tuple(Layer(layer.nodes.reshape(shape), layer.silent) for layer in value.layers)
    return Value(tuple(shape), layers, value.uniform, value.parameter)


@rule(
    "zeros ones full empty zeros_like ones_like full_like empty_like rand rand_like randn randn_like new_zeros "
    "new_ones new_full new_empty scalar_tensor bernoulli"
)
def uniform(call: Call) -> Value:
    return Value(tuple(call.shape), uniform=True)


@rule("_assert_tensor_metadata _assert_scalar _assert_async sym_size sym_constrain_range sym_constrain_range_for_size")
def nothing(call: Call) -> None:
    return None


@rule("arange linspace tril triu eye one_hot")
def constant(call: Call) -> Any:
    return unknown(call, f"{call.where} tells places apart")


def plus_bias(call: Call, out: Value, bias: Value | None, dim: int) -> Value:
    if bias is None:
        return out
    vector = broadcast_at(bias, dim, len(out.shape))
    return combine(call, [out, vector], lambda states: all(states) and len(states) == 2)
