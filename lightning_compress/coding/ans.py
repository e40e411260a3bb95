"""The stream of coder="ans": one stack of asymmetric numeral systems (ANS) for all tensors, by constriction.

constriction gets the k frequencies of a model minus 1, as whole floats with the sum 2^24 - k. It scales them by
(2^24 - k) / sum = 1.0 and adds 1 to each. No step rounds, so every machine gets the same model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from constriction import stream as constriction_stream

from lightning_compress.coding import frequencies as tables
from lightning_compress.coding.packing import Array, packed_bytes
from lightning_compress.coding.streams import PIECE, Reader, Writer, count

AnsCoder = constriction_stream.stack.AnsCoder
Categorical, Uniform = constriction_stream.model.Categorical, constriction_stream.model.Uniform

_GROUPED = 4096  # most different groups; symbols of a large tensor are coded in groups
_GROUP_FROM = 1 << 18  # fewest symbols coded in groups; for fewer, building the table takes too long
_PACK_FROM = 1 << 12  # fewest symbols that are packed; for fewer, a partly filled last byte costs too much
_FEW = 8  # most values of a step that is cached, because headers repeat it
_PACKED, _UNIFORM = len(tables.RESOLUTIONS), len(tables.RESOLUTIONS) + 1  # kinds of tables after the resolutions
_KINDS = len(tables.RESOLUTIONS) + 2


@dataclass(frozen=True)
class _Step:
    """Symbols that are coded together.

    Attributes:
        symbols: The symbols.
        model: constriction's model of a symbol, or of a group of symbols.
        chances: The probability that each symbol is 1, in 2^-24, if every symbol has its own.
        group: How many symbols are coded as one.
        size: The size of the alphabet; only needed for groups.
    """

    symbols: Array
    model: Any
    chances: Array | None = None
    group: int = 1
    size: int = 1


@lru_cache(maxsize=1 << 12)
def _few(values: tuple[int, ...], size: int) -> _Step:
    return _Step(np.array(values, np.int32), Uniform(size))


class AnsWriter(Writer):
    """Writes symbols at their entropy."""

    adaptive = True

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[_Step] = []

    def extend(self, other: AnsWriter) -> None:
        super().extend(other)
        self._steps += other._steps

    def uniform(self, values: Array | list[int], size: int) -> None:
        if size > 1 and len(values):
            few = isinstance(values, list) and len(values) <= _FEW
            self._steps.append(_few(tuple(values), size) if few else _Step(np.asarray(values), Uniform(size)))
            self.bits += len(values) * math.log2(size)

    def coded(self, symbols: Array, size: int) -> None:
        if size == 1 or not len(symbols):
            return
        counts = count(symbols, size)
        ways = [(len(symbols) * math.log2(size), _UNIFORM, np.empty(0, np.int64), 0)]
        if size & (size - 1) == 0 and len(symbols) >= _PACK_FROM:
            ways = [(8 * packed_bytes(len(symbols), size.bit_length() - 1), _PACKED, np.empty(0, np.int64), 0)]
        for kind, resolution in enumerate(tables.RESOLUTIONS):
            levels = tables.to_levels(counts, resolution)
            highest = int(levels.max())
            bits = tables.cost(counts, tables.from_levels(levels.tolist(), resolution))
            ways.append((bits + size * math.log2(highest + 1) + 2 * math.log2(highest + 1) + 1, kind, levels, highest))
        _, kind, levels, highest = min(ways, key=lambda way: way[0])
        self.uniform([kind], _KINDS)
        if kind == _PACKED:
            self.packed(symbols, size.bit_length() - 1)
        elif kind == _UNIFORM:
            self.uniform(symbols, size)
        else:
            self.number(highest)
            self.uniform(levels, highest + 1)
            self._modelled(symbols, counts, tables.from_levels(levels.tolist(), tables.RESOLUTIONS[kind]))

    def _modelled(self, symbols: Array, counts: Array, frequencies: Array) -> None:
        self.bits += tables.cost(counts, frequencies)
        group = _group(len(symbols), len(frequencies))
        whole = len(symbols) // group * group
        if group > 1:
            model = _model(tables.of_groups(frequencies, group))
            self._steps.append(_Step(symbols[:whole], model, group=group, size=len(frequencies)))
        if whole < len(symbols) or group == 1:
            self._steps.append(_Step(symbols if group == 1 else symbols[whole:], _model(frequencies)))

    def binary(self, symbols: Array, chances: Array) -> None:
        self._steps.append(_Step(symbols, Categorical(perfect=False), chances))
        taken = np.where(symbols, chances, tables.TOTAL - chances)
        self.bits += float((tables.PRECISION - np.log2(taken)).sum())

    def finish(self) -> bytes:
        coder = AnsCoder()
        for step in reversed(self._steps):  # ANS is a stack: the symbols to be read first are written last
            piece = PIECE * step.group
            for start in reversed(range(0, len(step.symbols), piece)):
                symbols = _joined(step.symbols[start : start + piece], step.group, step.size)
                if step.chances is None:
                    coder.encode_reverse(symbols, step.model)
                else:
                    coder.encode_reverse(symbols, step.model, _pairs(step.chances[start : start + piece]))
        octets: Array = coder.get_compressed().astype("<u4", copy=False).view(np.uint8)
        end = len(octets) - 4 + len(octets[-4:].tobytes().rstrip(b"\0")) if len(octets) else 0
        return octets[:end].tobytes()  # without the zero bytes of the last word, which is never zero itself


class AnsReader(Reader):
    """Reads the content that an `AnsWriter` wrote."""

    def __init__(self, stream: memoryview, raw: memoryview) -> None:
        super().__init__(stream, raw)
        octets = np.zeros(-(-len(stream) // 4) * 4, np.uint8)
        octets[: len(stream)] = np.frombuffer(stream, np.uint8)
        words = octets.view("<u4").astype(np.uint32, copy=False)
        if len(words) and not words[-1]:
            self.fail("its stream ends in zeros")
        self._coder = AnsCoder(words)
        self._start = self._coder.num_valid_bits()

    @property
    def bits(self) -> float:
        return float(self._start - self._coder.num_valid_bits())

    def uniform(self, count: int, size: int) -> Array:
        if size == 1:
            return np.zeros(count, np.int32)
        found: Array = self._coder.decode(Uniform(size), count)
        return found

    def coded(self, count: int, lookup: Array) -> Iterator[Array]:
        size = len(lookup)
        if size == 1 or not count:
            for start in range(0, count, PIECE):
                yield lookup[np.zeros(min(PIECE, count - start), np.int8)]
            return
        kind = int(self.uniform(1, _KINDS)[0])
        if kind == _PACKED:
            width = size.bit_length() - 1
            if size != 1 << width:
                self.fail(f"{size} symbols are packed")
            for start in range(0, count, PIECE):
                yield lookup[self.packed(min(PIECE, count - start), width)]
        elif kind == _UNIFORM:
            for start in range(0, count, PIECE):
                yield lookup[self.uniform(min(PIECE, count - start), size)]
        else:
            highest = self.number(tables.MAX_LEVEL + 1)
            levels = self.uniform(size, highest + 1).tolist()
            yield from self._modelled(count, lookup, tables.from_levels(levels, tables.RESOLUTIONS[kind]))

    def _modelled(self, count: int, lookup: Array, frequencies: Array) -> Iterator[Array]:
        group = _group(count, len(frequencies))
        whole = count // group
        if group > 1:
            model, entries = _model(tables.of_groups(frequencies, group)), _group_lookup(lookup, group)
            for start in range(0, whole, PIECE):
                found = entries.take(self._coder.decode(model, min(PIECE, whole - start)), mode="clip")
                yield found.view(lookup.dtype)
            count -= whole * group
        model = _model(frequencies)
        for start in range(0, count, PIECE):
            yield lookup.take(self._coder.decode(model, min(PIECE, count - start)), mode="clip")

    def binary(self, chances: Array) -> Array:
        found: Array = self._coder.decode(Categorical(perfect=False), _pairs(chances))
        return found

    def finish(self) -> None:
        self._finish_raw()
        if not self._coder.is_empty():
            self.fail("its stream continues after the last tensor")


def _model(frequencies: Array) -> Any:
    return Categorical((frequencies - 1).astype(np.float64), perfect=False)


def _pairs(chances: Array) -> Array:
    pairs = np.empty((len(chances), 2), np.float32)  # float32 is exact below 2^24
    pairs[:, 1] = chances - 1
    pairs[:, 0] = tables.TOTAL - 1 - chances
    return pairs


def _joined(symbols: Array, group: int, size: int) -> Array:
    """Return each group of symbols as one int32 number, its first symbol the most significant digit."""
    if group == 1:
        return symbols.astype(np.int32, copy=False)
    joined = symbols[::group].astype(np.uint16)  # numbers are below `_GROUPED`
    for place in range(1, group):
        joined *= np.uint16(size)
        joined += symbols[place::group]
    return joined.astype(np.int32)


def _group(count: int, size: int) -> int:
    if count < _GROUP_FROM:
        return 1
    return max(1, next(group for group in range(13) if size ** (group + 1) > _GROUPED))


def _group_lookup(lookup: Array, group: int) -> Array:
    """Return the entries of each possible group of symbols as one item."""
    places = np.indices((len(lookup),) * group).reshape(group, -1).T
    entries = np.ascontiguousarray(lookup[places])
    return entries.view(f"V{group * lookup.itemsize}").reshape(-1)
