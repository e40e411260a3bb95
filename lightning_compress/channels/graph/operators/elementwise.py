"""Elementwise operators: they tie the channels of the operands that they combine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning_compress.channels.graph.operators.call import Call, rule, unknown, values_in
from lightning_compress.channels.graph.units import Layer, Value, align

_KEEPS_ZERO = (
    "relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish tanh hardswish abs neg sqrt square sign sgn sin tan "
    "asinh atan erf expm1 log1p sinh ceil floor round trunc softshrink hardshrink dropout feature_dropout rrelu "
    "to _to_copy type_as clone contiguous alias detach lift_fresh_copy lift_fresh positive nan_to_num softsign "
    "real imag complex _conj conj conj_physical resolve_conj resolve_neg _neg_view angle "
    "float double half bfloat16 native_dropout dropout_ _unsafe_view_copy detach_copy"
)
_LOSES_ZERO = (
    "sigmoid hardsigmoid exp exp2 log log2 log10 cos cosh acos softplus log_sigmoid reciprocal rsqrt clamp clamp_min "
    "clamp_max logical_not bitwise_not isnan isinf isfinite eq ne lt le gt ge alpha_dropout feature_alpha_dropout "
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor bitwise_left_shift fmod remainder atan2 "
    "floor_divide threshold erfc digamma lgamma isneginf isposinf __and__ __or__ __xor__"
)


@rule(
    f"{_KEEPS_ZERO} {_LOSES_ZERO} add sub rsub mul div maximum minimum pow where masked_fill lerp addcmul addcdiv polar"
)
def elementwise(call: Call) -> Value:
    operands = values_in(call.arguments)
    silent = _SILENT.get(call.name)
    if call.name == "div" and _divides_by_its_own(call):  # zeros in the divisor would make infinities
        call.units.consumed += [layer.nodes for layer in call["other"].layers]
    if silent is None:
        keeps = call.name in _KEEPS_ZERO.split()
        return combine(call, operands, lambda states: keeps and all(states))
    return combine(call, operands, lambda states: silent(call, states))


def _zero(call: Call, *names: str) -> bool:
    """Return whether the plain numbers among some arguments are zero."""
    return all(call[name] == 0 for name in names if not isinstance(call[name], Value))


def _divides_by_its_own(call: Call) -> bool:
    """Return whether the operator divides an activation by a parameter or a buffer, such as a standard deviation."""
    over, by = call["self"], call["other"]
    return isinstance(by, Value) and by.parameter and isinstance(over, Value) and not over.parameter


def _bounds(call: Call, sign: int, name: str) -> bool:
    """Return whether a bound keeps zero: there is none, or it is a number on its own side of zero."""
    bound = call[name]
    return bound is None or (isinstance(bound, int | float) and bound * sign >= 0)


_SILENT: dict[str, Callable[[Call, list[bool]], bool]] = {
    "add": lambda call, states: all(states) and _zero(call, "self", "other"),
    "sub": lambda call, states: all(states) and _zero(call, "self", "other"),
    "rsub": lambda call, states: all(states) and _zero(call, "self", "other"),
    "maximum": lambda call, states: all(states) and len(states) == 2,
    "minimum": lambda call, states: all(states) and len(states) == 2,
    "mul": lambda call, states: any(states) or call["other"] == 0,
    "div": lambda call, states: states[0] and (len(states) == 1 or not states[1] or _divides_by_its_own(call)),
    "pow": lambda call, states: states[0] and isinstance(call["exponent"], int | float) and call["exponent"] > 0,
    "where": lambda call, states: all(states[1:]) and _zero(call, "self", "other"),
    "masked_fill": lambda call, states: states[0] and (states[-1] if len(states) == 3 else _zero(call, "value")),
    "clamp": lambda call, states: all(states) and _bounds(call, -1, "min") and _bounds(call, 1, "max"),
    "clamp_min": lambda call, states: all(states) and _bounds(call, -1, "min"),
    "clamp_max": lambda call, states: all(states) and _bounds(call, 1, "max"),
    "lerp": lambda call, states: all(states[:2]) and len(states) >= 2,
    "addcmul": lambda call, states: states[0] and any(states[1:]),
    "polar": lambda call, states: states[0],
    "addcdiv": lambda call, states: all(states[:2]),
}


def combine(call: Call, operands: Sequence[Value], silent: Callable[[list[bool]], bool]) -> Value:
    """Tie operands that are combined entry by entry, with broadcasting.

    Args:
        call: The operator.
        operands: The operands.
        silent: Returns whether the result is zero, given for every operand whether it is.
    """
    shape = broadcast([value.shape for value in operands])
    layers: list[Layer] = []
    for dim in range(len(shape)):
        here = [_at(value, dim, len(shape)) for value in operands]
        present = [layer for found in here for layer in found]
        if not present or any(layer.dims[0] < dim for layer in present):
            # No layer varies along this dimension, or the layers were tied along an earlier one.
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
            layers.append(_tie(call, operands, here, why, silent))
    parameter = all(value.parameter for value in operands)
    uniform = all(value.uniform for value in operands)
    return Value(tuple(shape), tuple(layers), uniform, parameter, zero=silent([value.zero for value in operands]))


def _tie(
    call: Call,
    operands: Sequence[Value],
    here: Sequence[Sequence[Layer]],
    why: str,
    silent: Callable[[list[bool]], bool],
) -> Layer:
    present = [layer for found in here for layer in found]
    kept = min(present, key=lambda layer: layer.nodes.numel())
    for layer in present:
        if layer is not kept:
            call.units.tie(layer.nodes, kept.nodes, why)
    states = [
        value.zero or (bool(found) and all(layer.silent for layer in found))
        for value, found in zip(operands, here, strict=True)
    ]
    return Layer(kept.nodes, silent(states))


def broadcast(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True)
    return [next((size for size in column if size != 1), 1) for column in columns]


def _at(value: Value, dim: int, dims: int) -> list[Layer]:
    """Return a value's layers along a dimension of the broadcast result."""
    aligned = [Layer(align(layer.nodes, dims), layer.silent) for layer in value.layers]
    return [layer for layer in aligned if dim in layer.dims]


@rule("prelu")
def prelu(call: Call) -> Value:
    x, weight = call["self"], call["weight"]
    if math.prod(weight.shape) == 1:
        return combine(call, [x], all)
    return combine(call, [x, broadcast_at(weight, 1, len(x.shape))], lambda states: states[0])


def broadcast_at(value: Value, dim: int, dims: int) -> Value:
    """Reshape a vector to lie along one dimension."""
    shape = [1] * dims
    shape[dim] = value.shape[0]
    layers = tuple(Layer(layer.nodes.reshape(shape), layer.silent) for layer in value.layers)
    return Value(tuple(shape), layers, value.uniform, value.parameter)


@rule(
    "zeros ones full empty zeros_like ones_like full_like empty_like rand rand_like randn randn_like new_zeros "
    "new_ones new_full new_empty scalar_tensor bernoulli"
)
def uniform(call: Call) -> Value:
    filled = call["fill_value"] if "full" in call.name else call["s"] if call.name == "scalar_tensor" else 1
    return Value(tuple(call.shape), uniform=True, zero="zeros" in call.name or filled == 0)


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
