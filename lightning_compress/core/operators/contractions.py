"""Operators that sum over a product: what is summed over is tied, the rest goes on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_compress.core.operators.call import Call, rule, unknown
from lightning_compress.core.operators.elementwise import combine, plus_bias
from lightning_compress.core.units import Layer, Value


def contract(call: Call, equation: str, a: Value, b: Value, *, arguments: tuple[str, str] = ("", "")) -> Value:
    """Tie what `torch.einsum(equation, a, b)` sums over, and carry the rest on."""
    left, right = equation.split("->")
    letters_a, letters_b = left.split(",")
    order = sorted(set(letters_a + letters_b))
    position = {letter: place for place, letter in enumerate(order)}

    def lay(layer: Layer, letters: str) -> Tensor:
        shape = [1] * len(order)
        for letter, size in zip(letters, layer.nodes.shape, strict=True):
            shape[position[letter]] = size
        permutation = sorted(range(len(letters)), key=lambda place: position[letters[place]])
        return layer.nodes.permute(permutation).reshape(shape)

    summed = {letter for letter in order if letter not in right}
    size_a, size_b = dict(zip(letters_a, a.shape, strict=True)), dict(zip(letters_b, b.shape, strict=True))
    laid: list[tuple[Tensor, Layer, Value, str, set[str]]] = []
    for value, letters, argument in ((a, letters_a, arguments[0]), (b, letters_b, arguments[1])):
        for layer in value.layers:
            varying = {letters[dim] for dim in layer.dims}
            laid.append((lay(layer, letters), layer, value, argument, varying))
    results: list[tuple[Tensor, bool]] = []
    done: set[int] = set()
    for place, (nodes, layer, value, argument, varying) in enumerate(laid):
        if place in done:
            continue
        partners = [(p, other) for p, other in enumerate(laid) if other[2] is not value and other[4] & varying]
        shared = {x for x in varying if size_a.get(x, 1) > 1 and size_b.get(x, 1) > 1}
        why = f"{call.where} meets values that are no channels, such as an input, a place or a constant"
        met = set[str]().union(*(other[4] for _, other in partners))
        if shared - met and not (b if value is a else a).uniform:
            call.units.freeze(nodes, why)
        best = nodes
        for p, other in partners:
            done.add(p)
            call.units.tie(nodes, other[0], why)
            if other[0].numel() < best.numel():
                best = other[0]
        inner = varying & summed
        if inner and varying - summed:
            call.units.freeze(nodes, f"{call.where} mixes channels with places")
            continue
        if inner:
            sides = [(layer, value, argument), *((other[1], other[2], other[3]) for _, other in partners)]
            read = [one for one, owner, _ in sides if owner.parameter]
            made_of_parameters = a.parameter and b.parameter
            call.units.consumed += [one.nodes for one in read[made_of_parameters:]]
            if not made_of_parameters and not any(one.silent for one, owner, _ in sides if not owner.parameter):
                data = next((side for side in sides if not side[1].parameter), sides[0])
                for dim in data[0].dims:
                    why = f"{call.where} reads channels that are not zero when what makes them is"
                    call.inexact(data[2], dim, [data[0]], why, zero=True)
            continue
        silent = layer.silent or any(other[1].silent for _, other in partners)
        results.append((best, silent))
    layers = []
    for nodes, silent in results:
        kept = nodes.permute([position[x] for x in right] + [position[x] for x in order if x not in right])
        layers.append(Layer(kept.reshape(kept.shape[: len(right)]), silent))
    sizes = size_a | {letter: size for letter, size in size_b.items() if size > 1}
    return Value(tuple(sizes[x] for x in right), tuple(layers), False, a.parameter and b.parameter)


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


@rule("matmul mm bmm mv dot addmm baddbmm addmv")
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
    return contract(call, equation, *operands)


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
    weights = Value(scores.shape, tuple(Layer(layer.nodes, False) for layer in scores.layers))
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
