"""Entropy coding against Shannon's entropy, against integers alone, and against a Huffman tree built here."""

from __future__ import annotations

import heapq
import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.coding import frequencies, huffman, packing, save_compressed
from lightning_compress.coding.ans import AnsReader, AnsWriter
from lightning_compress.coding.bits import BitReader, BitWriter, HuffmanReader, HuffmanWriter

CODERS: dict[str, Any] = {
    "ans": (AnsWriter, AnsReader),
    "huffman": (HuffmanWriter, HuffmanReader),
    "none": (BitWriter, BitReader),
}


def bell(size: int, count: int, seed: int = 0) -> np.ndarray:
    shares = np.exp(-0.5 * np.linspace(-2.5, 2.5, size) ** 2)
    return np.random.default_rng(seed).choice(size, count, p=shares / shares.sum()).astype(np.uint16)


def entropy_bits(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / len(symbols))).sum())


def coded(coder: str, symbols: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    """Bits of the file's two parts, and the symbols that come back, by way of a lookup table."""
    writer = CODERS[coder][0]()
    writer.coded(symbols, size)
    raw, stream = b"".join(writer.raw_pieces()), writer.finish()
    assert writer.raw_bytes == len(raw)
    assert abs(8 * (len(raw) + len(stream)) - writer.bits) < 64
    reader = CODERS[coder][1](memoryview(stream), memoryview(raw))
    pieces = list(reader.coded(len(symbols), np.arange(size, dtype=np.uint16) * 3))
    reader.finish()
    return 8 * (len(raw) + len(stream)), np.concatenate([np.empty(0, np.uint16), *pieces]) // 3


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 256, 300, 4096])
@pytest.mark.parametrize("count", [0, 1, 2, 700, 5000, 262_145])
def test_symbols_come_back(coder: str, size: int, count: int) -> None:
    symbols = bell(size, count)
    assert np.array_equal(coded(coder, symbols, size)[1], symbols)


@pytest.mark.parametrize("coder", CODERS)
def test_one_symbol_among_many_that_never_come(coder: str) -> None:
    symbols = np.full(20_000, 7, np.uint16)
    bits, back = coded(coder, symbols, 9)
    assert np.array_equal(back, symbols)
    assert bits < {"ans": 64, "huffman": 20_200, "none": 80_001}[coder]


@pytest.mark.parametrize(("coder", "over"), [("ans", 1.001), ("huffman", 1.01)])
@pytest.mark.parametrize("size", [16, 32, 200])
def test_the_stream_is_at_the_entropy(coder: str, over: float, size: int) -> None:
    symbols = bell(size, 1_000_000)
    bits, _ = coded(coder, symbols, size)
    assert entropy_bits(symbols) * 0.99999 < bits <= entropy_bits(symbols) * over


def test_probabilities_are_integers_that_add_up() -> None:
    for size in (2, 3, 100, 4096):
        for resolution in frequencies.RESOLUTIONS:
            levels = np.random.default_rng(size).integers(0, 60, size).tolist()
            found = frequencies.from_levels(levels, resolution)
            assert found.sum() == 1 << 24
            assert found.min() >= 1
            exact = np.array([0.0 if level == 0 else 2.0 ** ((level - 1) / resolution) for level in levels])
            assert found / 2**24 == pytest.approx(exact / exact.sum(), rel=0.01, abs=size / 2**24)


def decode_by_integers(words: list[int], steps: list[tuple[int, list[int]]]) -> list[int]:
    """Asymmetric numeral systems in Python's integers: of each step how many symbols, and their frequencies."""
    state, stack = 0, list(words)
    while stack and state < 1 << 32:
        state = state << 32 | stack.pop()
    found = []
    for count, table in steps:
        ends = list(itertools.accumulate(table))
        for _ in range(count):
            place = state & (1 << 24) - 1
            symbol = next(i for i, end in enumerate(ends) if place < end)
            state = (state >> 24) * table[symbol] + place - (ends[symbol] - table[symbol])
            if state < 1 << 32 and stack:
                state = state << 32 | stack.pop()
            found.append(symbol)
    assert state == 0
    assert not stack
    return found


def test_another_decoder_of_integers_alone_reads_the_stream() -> None:
    symbols = bell(5, 300)
    writer = AnsWriter()
    writer.coded(symbols, 5)
    stream = writer.finish()
    padded = stream + bytes(-len(stream) % 4)
    words = list(struct.unpack(f"<{len(padded) // 4}I", padded))

    def equal(size: int) -> list[int]:
        return [(1 << 24) // size] * (size - 1) + [(1 << 24) - (1 << 24) // size * (size - 1)]

    # what the table takes before the symbols depends on the levels: try all resolutions that fit
    counts = np.bincount(symbols, minlength=5)
    for kind, resolution in enumerate(frequencies.RESOLUTIONS):
        levels = frequencies.to_levels(counts, resolution).tolist()
        table = frequencies.from_levels(levels, resolution).tolist()
        highest = max(levels)
        bits = elias_delta(highest)
        steps = [(1, equal(6))]
        steps += [(1, equal(size)) for size, _ in bits]
        steps += [(5, equal(highest + 1)), (300, table)]
        try:
            found = decode_by_integers(words, steps)
        except (AssertionError, StopIteration):
            continue
        assert found == [kind, *(value for _, value in bits), *levels, *symbols]
        return
    raise AssertionError("no resolution reads the stream")


def elias_delta(number: int) -> list[tuple[int, int]]:
    """Fields (size, value) of a number plus 1: zeros and a one, the low bits of its length, its own low bits."""
    length = (number + 1).bit_length()
    prefix = length.bit_length()
    fields = [(2, 0)] * (prefix - 1) + [(2, 1)]
    if prefix > 1:
        fields.append((1 << (prefix - 1), length - (1 << (prefix - 1))))
    if length > 1:
        fields.append((1 << (length - 1), number + 1 - (1 << (length - 1))))
    return fields


@pytest.mark.parametrize("coder", CODERS)
def test_numbers_of_any_size_and_sign(coder: str) -> None:
    numbers = [0, 1, 2, 3, 15, 16, 255, 65_535, 65_536, 2**33, 2**63, 2**64 - 2]
    writer = CODERS[coder][0]()
    for number in numbers:
        writer.number(number)
        writer.signed(number // 3)
        writer.signed(-number // 3)
    reader = CODERS[coder][1](memoryview(writer.finish()), memoryview(b""))
    for number in numbers:
        assert (reader.number(), reader.signed(), reader.signed()) == (number, number // 3, -number // 3)
    reader.finish()


# ------------------------------------------------------------------------------------------------ Huffman


def tree_cost(counts: list[int]) -> int:
    """Bits of the best prefix code: the sum of all inner nodes of Huffman's tree."""
    heap = [count for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return total


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60).filter(any))
def test_code_lengths_are_as_good_as_the_tree(counts: list[int]) -> None:
    lengths = huffman.code_lengths(counts)
    assert sum(count * length for count, length in zip(counts, lengths, strict=True)) == tree_cost(counts)
    used = [format(code, f"0{length}b") for code, length in zip(huffman.codes(lengths), lengths, strict=True) if length]
    assert not [(a, b) for a, b in itertools.permutations(used, 2) if b.startswith(a)]


def test_very_uneven_counts_stay_within_sixteen_bits() -> None:
    counts = [2**i for i in range(40)]
    lengths = huffman.code_lengths(counts)
    assert max(lengths) <= 16
    assert sum(2.0**-length for length in lengths) == 1
    symbols = np.random.default_rng(0).integers(0, 40, 100_000)
    words, lanes = huffman.encode(symbols, lengths)
    assert np.array_equal(huffman.decode(words, lanes, len(symbols), lengths), symbols)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 2, 2], [0, 0], [1, 2]])
def test_lengths_that_no_complete_code_has_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="no complete code"):
        huffman.codes(lengths)


# ------------------------------------------------------------------------------------------------ packing, whole files


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(0, 70), st.integers(0, 2**32))
def test_packed_integers_are_the_bits_one_after_the_other(width: int, count: int, seed: int) -> None:
    values = [int(one) % (1 << width) for one in np.random.default_rng(seed).integers(0, 2**63, count)]
    data = b"".join(packing.pack(np.array(values, np.uint64), width))
    text = "".join(f"{value:0{width}b}" for value in values)
    assert "".join(f"{octet:08b}" for octet in data)[: len(text)] == text
    assert packing.unpack(data, count, width).tolist() == values


def test_deep_compressions_way_is_taken_for_huffman_and_beats_zlib(tmp_path: Path) -> None:
    """Positions with gaps, where a bit for every entry would cost more; against zlib of indices and gaps as bytes."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(32, generator=generator)
    index = torch.from_numpy(bell(32, 300 * 784).astype(np.int64)).view(300, 784)
    weight = table[index] * (torch.rand(300, 784, generator=generator) < 0.05)
    size = save_compressed({"w": weight}, tmp_path / "f", coder="huffman")
    assert "relative index" in size.tensors[0].encoding
    places = weight.flatten().nonzero()[:, 0].numpy()
    gaps = np.minimum(np.diff(places, prepend=-1) - 1, 255).astype(np.uint8)
    zipped = zlib.compress(gaps.tobytes(), 9) + zlib.compress(index.flatten().numpy()[places].astype(np.uint8), 9)
    assert size.bytes < len(zipped)
    assert save_compressed({"w": weight}, tmp_path / "f", coder="ans").bytes < 0.99 * size.bytes
