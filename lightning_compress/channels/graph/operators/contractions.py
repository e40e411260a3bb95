"""Operators that sum over a product: they tie the dimensions that are summed over, and pass the others on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_compress.channels.graph.operators.call import Call, rule, unknown
from lightning_compress.channels.graph.operators.elementwise import combine, plus_bias
from lightning_compress.channels.graph.units import Layer, Value


@dataclass(frozen=True, eq=False)
class _Laid:
    """A layer of one factor, with one dimension for every letter of the equation.

    Attributes:
        nodes: Its nodes in these dimensions.
        layer: The layer.
        factor: Number of the factor.
        letters: Letters along which the nodes vary.
    """

    nodes: Tensor
    layer: Layer
    factor: int
    letters: frozenset[str]


def contract(call: Call, equation: str, a: Value, b: Value, *, arguments: tuple[str, str] = ("", "")) -> Value:
    """Tie the dimensions that `torch.einsum(equation, a, b)` sums over, and pass the others on.

    Args:
        call: The operator.
        equation: The equation, with two factors and an arrow.
        a: The first factor.
        b: The second factor.
        arguments: Names of the operator's arguments that hold the factors.
    """
    left, right = equation.split("->")
    factors, spelled = (a, b), left.split(",")
    order = sorted(set("".join(spelled)))
    laid = [
        _Laid(_lay(layer, letters, order), layer, number, frozenset(letters[dim] for dim in layer.dims))
        for number, (value, letters) in enumerate(zip(factors, spelled, strict=True))
        for layer in value.layers
    ]
    sizes = [dict(zip(letters, value.shape, strict=True)) for value, letters in zip(factors, spelled, strict=True)]
    shared = {letter for letter in order if all(size.get(letter, 1) > 1 for size in sizes)}
    results: list[tuple[Tensor, bool]] = []
    done: set[int] = set()
    why = f"{call.where} meets values that are no channels, such as an input, a place or a constant"
    for one in laid:
        if id(one) in done:
            continue
        partners = [other for other in laid if other.factor != one.factor and other.letters & one.letters]
        done |= {id(other) for other in partners}
        sides = [one, *partners]
        for other in partners:
            call.units.tie(one.nodes, other.nodes, why)
        inner = one.letters - set(right)
        if inner:
            _sum_over(call, sides, factors, arguments)
        if (one.letters & shared) - frozenset[str]().union(*(other.letters for other in partners)):
            if not factors[1 - one.factor].uniform:
                call.units.freeze(one.nodes, why)
        elif inner and one.letters - inner:
            call.units.freeze(one.nodes, f"{call.where} mixes channels with places")
        elif not inner:
            makers = [] if a.parameter and b.parameter else [side for side in sides if factors[side.factor].parameter]
            call.units.produced += [side.nodes for side in makers]
            smallest = min((side.nodes for side in sides), key=Tensor.numel)
            results.append((smallest, any(side.layer.silent for side in sides)))
    position = {letter: place for place, letter in enumerate(order)}
    layers = []
    for nodes, silent in results:
        kept = nodes.permute([position[x] for x in right] + [position[x] for x in order if x not in right])
        layers.append(Layer(kept.reshape(kept.shape[: len(right)]), silent))
    shape = tuple(max(size.get(letter, 1) for size in sizes) for letter in right)
    return Value(shape, tuple(layers), False, a.parameter and b.parameter)


def _lay(layer: Layer, letters: str, order: Sequence[str]) -> Tensor:
    ordered = layer.nodes.permute(sorted(range(len(letters)), key=lambda place: order.index(letters[place])))
    sizes = dict(zip(sorted(letters), ordered.shape, strict=True))
    return ordered.reshape([sizes.get(letter, 1) for letter in order])


def _sum_over(call: Call, sides: Sequence[_Laid], factors: Sequence[Value], arguments: tuple[str, str]) -> None:
    """Record which slices read the summed channels, and that a cut is inexact where these are not silent."""
    weights = [side for side in sides if factors[side.factor].parameter]
    data = [side for side in sides if not factors[side.factor].parameter]
    if all(value.parameter for value in factors):
        call.units.consumed += [side.nodes for side in weights[1:]]
        return
    call.units.consumed += [side.nodes for side in weights]
    if data and not any(side.layer.silent for side in data):
        why = f"{call.where} reads channels that are not zero when what makes them is"
        for dim in data[0].layer.dims:
            call.inexact(arguments[data[0].factor], dim, [data[0].layer], why, zero=True)


def _letters(count: int, start: int = 0) -> str:
    return "".join(chr(ord("a") + start + place) for place in range(count))


@rule("linear")
def linear(call: Call) -> Value:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    batch = _letters(len(x.shape) - 1)
    out = contract(call, f"{batch}y,zy->{batch}z", x, weight, arguments=("input", "weight"))
    return plus_bias(call, out, bias, -1)


_FACTORS = (
    ("mat1", "mat2"),
    ("batch1", "batch2"),
    ("mat", "vec"),
    ("self", "other"),
    ("self", "mat2"),
    ("self", "vec"),
    ("self", "tensor"),
)


@rule("matmul mm bmm mv dot vdot addmm baddbmm addmv")
def matmul(call: Call) -> Value:
    names = next(pair for pair in _FACTORS if all(isinstance(call[name], Value) for name in pair))
    a, b = (call[name] for name in names)
    rank_a, rank_b = len(a.shape), len(b.shape)
    batch = max(rank_a - 2, rank_b - 2, 0)
    letters = _letters(batch)
    left = letters[batch - max(rank_a - 2, 0) :] + ("xy" if rank_a > 1 else "y")
    right = letters[batch - max(rank_b - 2, 0) :] + ("yz" if rank_b > 1 else "y")
    out = letters + ("x" if rank_a > 1 else "") + ("z" if rank_b > 1 else "")
    result = contract(call, f"{left},{right}->{out}", a, b, arguments=names)
    if call.name.startswith(("add", "badd")):
        return combine(call, [result, call["self"]], lambda states: all(states) and len(states) == 2)
    return result


@rule("einsum")
def einsum(call: Call) -> Any:
    equation, operands = call["equation"].replace(" ", ""), list(call["tensors"])
    repeats = any(len(set(part)) < len(part) for part in equation.replace("->", ",").split(","))
    if len(operands) != 2 or "." in equation or repeats:
        return unknown(call, f"{call.where} with the equation {equation!r} is unknown to the planner")
    if "->" not in equation:
        both = equation.replace(",", "")
        equation += "->" + "".join(sorted(letter for letter in set(both) if both.count(letter) == 1))
    return contract(call, equation, *operands, arguments=("tensors.0", "tensors.1"))


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Value:
    q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    if call["scale"] is None:
        call.freeze(q.along(-1), f"{call.where} takes its scale from the width of the heads: pass scale= to free them")
    if call["enable_gqa"] and q.shape[-3] != k.shape[-3]:
        k, v = (_repeat(value, -3, q.shape[-3] // value.shape[-3]) for value in (k, v))
    batch = _letters(len(q.shape) - 2)
    scores = contract(call, f"{batch}xe,{batch}ye->{batch}xy", q, k, arguments=("query", "key"))
    if mask is not None:
        scores = combine(call, [scores, mask], lambda states: False)
    keys = scores.along(-1)
    call.freeze(keys, f"{call.where} divides by a sum over channels")
    weights = Value(scores.shape, tuple(Layer(one.nodes, False) for one in scores.layers if one not in keys))
    return contract(call, f"{batch}xy,{batch}ye->{batch}xe", weights, v, arguments=("", "value"))


def _repeat(value: Value, dim: int, times: int) -> Value:
    dim %= len(value.shape)
    layers = tuple(
        Layer(layer.nodes.repeat_interleave(times, dim) if dim in layer.dims else layer.nodes, layer.silent)
        for layer in value.layers
    )
    shape = list(value.shape)
    shape[dim] *= times
    return Value(tuple(shape), layers, value.uniform, value.parameter)
