"""Operators that rearrange, join or split entries: they do the same with the labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_compress.channels.graph.operators.call import Call, rule, values_in
from lightning_compress.channels.graph.operators.elementwise import broadcast, combine
from lightning_compress.channels.graph.units import FIXED, Layer, Value, compress, restructure, split_apart


@rule(
    "view reshape _unsafe_view flatten unflatten permute transpose t numpy_T squeeze unsqueeze expand expand_as "
    "movedim moveaxis swapaxes swapdims flip repeat tile repeat_interleave "
    "pixel_shuffle pixel_unshuffle channel_shuffle unfold select diagonal view_as reshape_as mT mH matrix_H adjoint"
)
def structure(call: Call) -> Value:
    source = next(iter(values_in(call.arguments)))
    layers = []
    for layer in source.layers:
        nodes = restructure(source, layer, _operation(call))
        varying = [dim for dim, size in enumerate(nodes.shape) if size > 1]
        if len(varying) > len(layer.dims):
            nodes = split_apart(nodes, varying, call.axis_order, call.units, f"{call.where} takes channels apart")
            varying = [dim for dim, size in enumerate(nodes.shape) if size > 1]
        if varying:
            layers.append(Layer(nodes, layer.silent))
        else:
            call.units.freeze(nodes, f"{call.where} picks out single channels")
    repeated = _repeated(source, call.shape) if call.name in ("expand", "expand_as") else frozenset()
    return Value(tuple(call.shape), tuple(layers), source.uniform, source.parameter, repeated, source.zero)


def _repeated(source: Value, shape: Sequence[int]) -> frozenset[int]:
    before = (1,) * (len(shape) - len(source.shape)) + source.shape
    return frozenset(dim for dim, size in enumerate(shape) if before[dim] == 1 < size)


@rule("slice narrow")
def cut_out(call: Call) -> Value:
    """Return the slice of a tensor; halves must lose equally many channels each, other boundaries are fixed."""
    source: Value = call["self"]
    dim = (call["dim"] or 0) % len(source.shape)
    size, length = source.shape[dim], call.shape[dim]
    start = (call["start"] or 0) if (call["start"] or 0) >= 0 else size + call["start"]
    step = call["step"] or 1
    halves = step == 1 and 2 * length == size and start in (0, length)
    layers = []
    for layer in source.layers:
        if dim not in layer.dims or length == size:
            layers.append(layer)
        elif halves:
            first, second = layer.nodes.chunk(2, dim)
            call.units.tie(first, second, f"{call.where} takes channels apart")
            call.units.halved.append(first.reshape(-1))
            layers.append(Layer(first, layer.silent))
        else:
            # Positions behind the boundary may leave, but a cut before the boundary would move it.
            named = size if step != 1 else start if start + length == size else start + length
            why = f"{call.where} takes channels apart at a place that its code names"
            call.units.freeze(layer.nodes.narrow(dim, 0, named), why)
            if step == 1 and length > 1:
                layers.append(Layer(layer.nodes.narrow(dim, start, length), layer.silent))
    return Value(tuple(call.shape), tuple(layers), source.uniform, source.parameter, zero=source.zero)


@rule("roll")
def roll(call: Call) -> Value:
    source: Value = call["self"]
    dims = [dim % len(source.shape) for dim in call["dims"] or range(len(source.shape))]
    return _but_for(call, source, dims, "moves channels around")


_FFT = "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"


@rule(f"{_FFT} {_FFT.replace('fft ', 'fft2 ')}2 {_FFT.replace('fft ', 'fftn ')}n _fft_c2c _fft_r2c _fft_c2r")
def fourier(call: Call) -> Value:
    source: Value = call["self"]
    given, sizes = call["dim"], call["s"]
    if given is None:
        given = -1 if call.name in _FFT.split() else [-2, -1] if call.name.endswith("2") else None
    if given is None:
        given = range(-len(sizes), 0) if sizes is not None else range(len(source.shape))
    dims = [given] if isinstance(given, int) else list(given)
    return _but_for(call, source, [dim % len(source.shape) for dim in dims], "mixes channels")


def _but_for(call: Call, source: Value, dims: Sequence[int], what: str) -> Value:
    """Pass on the labels that do not vary along some dimensions, and freeze the others."""
    layers = []
    for layer in source.layers:
        if any(dim in layer.dims for dim in dims):
            call.freeze([layer], f"{call.where} {what}")
        else:
            layers.append(layer)
    return Value(tuple(call.shape), tuple(layers), source.uniform, source.parameter)


def _operation(call: Call) -> Callable[[Tensor], Tensor]:
    def operate(nodes: Tensor) -> Tensor:
        first = next(name for name, value in call.arguments.items() if isinstance(value, Value))
        arguments = {
            name: torch.empty(value.shape, device="meta") if isinstance(value, Value) else value
            for name, value in call.arguments.items()
        }
        arguments[first] = nodes
        if call.name in ("view", "_unsafe_view"):  # a view of expanded labels may be impossible
            return nodes.reshape(list(call["size"]))
        assert call.operate is not None
        result: Tensor = call.operate(**arguments)
        return result

    return operate


@rule("chunk split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split unsafe_split_with_sizes")
def pieces(call: Call) -> list[Value]:
    source: Value = call["self"]
    dim = (call["dim"] or 0) % len(source.shape)
    layers = list(source.layers)
    sizes = [1 if call.name == "unbind" else shape[dim] for shape in call.shape]
    equal = len(set(sizes)) == 1
    if not equal and call.name not in ("chunk", "unbind"):
        for layer in source.along(dim):
            named = layer.nodes.narrow(dim, 0, sum(sizes[:-1]))
            call.units.freeze(named, f"{call.where} takes channels apart at places that its code names")
    for index, layer in enumerate(layers):
        if equal and dim in layer.dims and call.name != "unbind":
            # A thin tensor still has equal pieces only if every piece loses the same positions.
            stacked = torch.unflatten(layer.nodes, dim, (len(sizes), sizes[0]))
            first = stacked.narrow(dim, 0, 1)
            call.units.tie(stacked, first, f"{call.where} takes channels apart")
            layers[index] = Layer(first.expand(stacked.shape).flatten(dim, dim + 1), layer.silent)
    results = []
    for place, shape in enumerate(call.shape):
        found = []
        for layer in layers:
            if dim not in layer.dims:
                nodes = layer.nodes if call.name != "unbind" else layer.nodes.squeeze(dim)
            else:
                nodes = layer.nodes.narrow(dim, sum(sizes[:place]), sizes[place])
                nodes = compress(nodes.squeeze(dim) if call.name == "unbind" else nodes)
            if any(size > 1 for size in nodes.shape):
                found.append(Layer(nodes, layer.silent))
            else:
                call.units.freeze(nodes, f"{call.where} picks out single channels")
        results.append(Value(tuple(shape), tuple(found), source.uniform, source.parameter))
    return results


@rule("glu")
def glu(call: Call) -> Value:
    source: Value = call["self"]
    dim = (-1 if call["dim"] is None else call["dim"]) % len(source.shape)
    layers = []
    for layer in source.layers:
        if dim not in layer.dims:
            layers.append(Layer(layer.nodes, layer.silent))
            continue
        value, gate = layer.nodes.chunk(2, dim)
        call.units.tie(value, gate, f"{call.where} multiplies one half of the channels by the other")
        layers.append(Layer(value, layer.silent))
    return Value(tuple(call.shape), tuple(layers))


@rule("cat stack concat")
def join(call: Call) -> Value:
    parts: list[Value] = list(call["tensors"])
    dim = (call["dim"] or 0) % len(call.shape)
    if call.name == "stack":
        parts = [
            Value(
                (*part.shape[:dim], 1, *part.shape[dim:]),
                tuple(Layer(layer.nodes.unsqueeze(dim), layer.silent) for layer in part.layers),
                part.uniform,
                part.parameter,
                zero=part.zero,
            )
            for part in parts
        ]
    parts = [part for part in parts if part.shape != (0,)]  # an empty cache
    joined = [part.along(dim) for part in parts]
    layers = []
    if any(joined):
        nodes = []
        for part, found in zip(parts, joined, strict=True):
            shape = broadcast([tuple(layer.nodes.shape) for some in joined for layer in some])
            shape[dim] = part.shape[dim]
            for extra in found[1:]:
                call.units.tie(extra.nodes, found[0].nodes, call.where)
            own = found[0].nodes if found else torch.tensor(FIXED).reshape([1] * len(shape))
            size = [1 if place != dim and own.shape[place] == 1 else shape[place] for place in range(len(shape))]
            nodes.append(own.expand([max(a, b) for a, b in zip(size, shape, strict=True)]))
        silent = all(layer.silent for found in joined for layer in found)
        layers.append(Layer(compress(torch.cat(nodes, dim)), silent))
    others = [
        Value(
            (*part.shape[:dim], 1, *part.shape[dim + 1 :]),
            tuple(layer for layer in part.layers if dim not in layer.dims),
            part.uniform,
            part.parameter,
            zero=part.zero,
        )
        for part in parts
    ]
    rest = combine(call, others, lambda states: all(states) and len(states) == len(parts))
    uniform = all(part.uniform for part in parts)
    zero = all(part.zero for part in parts)
    return Value(tuple(call.shape), (*layers, *rest.layers), uniform, rest.parameter, zero=zero)


@rule("constant_pad_nd pad")
def pad(call: Call) -> Value:
    source: Value = call["self"]
    amounts, value = list(call["pad"]), call["value"] or 0
    constant_mode = call["mode"] in (None, "constant")
    layers = []
    for layer in source.layers:
        nodes = layer.nodes
        for place in range(len(amounts) // 2):
            dim = len(source.shape) - 1 - place
            before, after = amounts[2 * place : 2 * place + 2]
            if dim not in layer.dims or (before == 0 and after == 0):
                continue
            if not constant_mode or before < 0 or after < 0:
                call.freeze([layer], f"{call.where} pads channels by others")
                break
            widths = [0] * (2 * (len(source.shape) - 1 - dim)) + [before, after]
            nodes = torch.nn.functional.pad(nodes, widths, value=FIXED)
        else:
            layers.append(Layer(nodes, layer.silent and (value == 0 or not constant_mode)))
    return Value(tuple(call.shape), tuple(layers), False, source.parameter)


@rule("view_as_real")
def as_real(call: Call) -> Value:
    source: Value = call["self"]
    layers = tuple(Layer(layer.nodes.unsqueeze(-1), layer.silent) for layer in source.layers)
    return Value(tuple(call.shape), layers, source.uniform, source.parameter, zero=source.zero)


@rule("view_as_complex")
def as_complex(call: Call) -> Value:
    source: Value = call["self"]
    last = len(source.shape) - 1
    call.freeze(source.along(last), f"{call.where} makes one number of two channels")
    layers = tuple(Layer(one.nodes.squeeze(-1), one.silent) for one in source.layers if last not in one.dims)
    return Value(tuple(call.shape), layers, source.uniform, source.parameter, zero=source.zero)
