"""Files that are truncated, damaged or crafted: the same tensors, or one CorruptFileError; nothing else."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.coding import CorruptFileError, load_compressed, save_compressed
from lightning_compress.coding.files import _read
from lightning_compress.coding.plain_values import read_varint, varint

LIMIT = 1 << 22  # bytes of tensors: a mutation may announce any size
CODERS: list[Any] = ["ans", "huffman", "none"]


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sparse = torch.rand(30, 40, generator=generator) < 0.1
    table = normal(16)
    return {
        "codebook.weight": table[torch.randint(16, (30, 40), generator=generator)] * sparse,
        "sparse.weight": normal(20, 20) * (torch.rand(20, 20, generator=generator) < 0.3),
        "signs.weight": normal(8, 30).sign() * normal(8, 1).abs(),
        "grid.weight": torch.randint(-7, 8, (8, 30), generator=generator) * 0.37,
        "raw.bias": normal(9),
        "half.bias": normal(9).half().float(),
        "steps": torch.tensor(12_345),
        "mask": torch.rand(50, generator=generator) < 0.5,
        "large": table[torch.randint(5, (20_000,), generator=generator)],
        "empty": torch.empty(0, 3),
        "tied": table,
        "again": table,
    }


@cache
def original(coder: Any) -> bytes:
    import tempfile

    path = Path(tempfile.mkdtemp()) / "f"
    save_compressed(torch.nn.Sequential(torch.nn.BatchNorm1d(3)).state_dict() | state(), path, coder=coder)
    return path.read_bytes()


def sealed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One of: bits flipped, bytes replaced, removed, doubled, or moved from elsewhere; the beginning more often."""
    content = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        place = chance.randrange(len(content)) if chance.random() < 0.6 else chance.randrange(min(80, len(content)))
        kind = chance.randrange(6)
        if kind == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        elif kind == 2:
            del content[place : place + chance.choice([1, 1, 4, 100])]
        elif kind == 3:
            content[place:place] = content[place : place + chance.choice([1, 4, 100])]
        elif kind == 4:
            other = chance.randrange(len(content))
            content[place : place + 8] = content[other : other + 8]
        else:
            del content[place:]
        if not content:
            break
    return bytes(content)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def fuzz(coder: Any, rounds: int, seed: int) -> None:
    data, chance = original(coder), random.Random(seed)
    expected = _read(data, LIMIT).state
    loaded = 0
    for turn in range(rounds):
        reseal = turn % 2 == 1
        damaged = sealed(mutated(data[:-4], chance)) if reseal else mutated(data, chance)
        try:
            found = _read(damaged, LIMIT).state
        except CorruptFileError:
            continue
        except Exception as error:
            raise AssertionError(f"{coder}, seed {seed}, turn {turn}: {error!r}") from error
        loaded += 1
        assert reseal or same(found, expected), f"{coder}, seed {seed}, turn {turn}: other tensors"
        assert sum(tensor.nbytes for tensor in found.values()) <= 2 * LIMIT  # tied ones count twice here
    assert loaded < rounds


@pytest.mark.parametrize("coder", CODERS)
def test_mutations_load_the_same_or_raise_one_error(coder: Any) -> None:
    fuzz(coder, 700, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("coder", CODERS)
def test_many_mutations_load_the_same_or_raise_one_error(coder: Any) -> None:
    fuzz(coder, 33_400, seed=1)


@pytest.mark.parametrize("coder", CODERS)
def test_every_truncation_and_a_flipped_bit_in_every_byte_is_found(coder: Any, tmp_path: Path) -> None:
    path = tmp_path / "f"
    weight = torch.zeros(40)
    weight[7] = 3.0
    save_compressed({"w": weight, "b": torch.ones(2)}, path, coder=coder)
    raw = path.read_bytes()
    damaged = [raw[:length] for length in range(len(raw))]
    for position in range(3, len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << position % 8
        damaged.append(bytes(flipped))
    damaged.append(raw + b"\0")
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=str(path)):
            load_compressed(path)


def test_what_does_not_begin_as_ours_is_read_as_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for content in (b"\x89PNG", b"PK", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="f is damaged, or holds objects besides tensors"):
            load_compressed(path)


def test_another_version_is_named(tmp_path: Path) -> None:
    content = bytearray(original("ans")[:-4])
    content[3] = 7
    (tmp_path / "f").write_bytes(sealed(bytes(content)))
    with pytest.raises(CorruptFileError, match="it has version 7 of the format, and only 1, 2 and 3 can be read"):
        load_compressed(tmp_path / "f")


@pytest.mark.parametrize(("rows", "problem"), [(1 << 23, "has a learned zero map"), (1 << 20, "has 1048576 steps")])
def test_a_learned_map_that_would_take_hours_is_refused(rows: int, problem: str) -> None:
    from lightning_compress.coding.ans import AnsReader, AnsWriter
    from lightning_compress.coding.encodings.tensor import read_tensor

    writer = AnsWriter()
    writer.uniform([1], 3)  # zero map
    writer.uniform([1], 2)  # learned
    writer.uniform([0], 2)  # steps are rows
    writer.uniform([0], 2)  # rate
    writer.uniform([2], 64)  # lag
    reader = AnsReader(memoryview(writer.finish()), memoryview(b""))
    with pytest.raises(CorruptFileError, match=problem):
        read_tensor(reader, torch.bool, (rows, 1))


def test_something_behind_the_end_is_found_though_the_checksum_fits(tmp_path: Path) -> None:
    for coder in CODERS:
        content = original(coder)[:-4]
        number, start = read_varint(content, 4)
        raw = content[start : start + number // 4]
        longer = content[:4] + varint(number + 4) + raw + b"x" + content[start + number // 4 :]
        for damaged in (longer, content + b"\1" * 4):
            (tmp_path / "f").write_bytes(sealed(damaged))
            with pytest.raises(CorruptFileError):
                load_compressed(tmp_path / "f")


PEAK = """
import resource, sys
from lightning_compress.coding import load_compressed
load_compressed(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_compressed(sys.argv[2])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes there")
@pytest.mark.parametrize(
    "coder", ["ans", *(pytest.param(one, marks=pytest.mark.slow) for one in CODERS if one != "ans")]
)
def test_memory_is_that_of_the_tensors_and_sixteen_files(coder: Any, tmp_path: Path) -> None:
    assert resource.RUSAGE_SELF is not None
    weight = torch.randn(16)[torch.randint(16, (6000, 5000))] * (torch.rand(6000, 5000) < 0.1)
    small, large = tmp_path / "small", tmp_path / "large"
    save_compressed({"w": weight[:300]}, small, coder=coder)
    size = save_compressed({"w": weight, "u": weight.abs().half(), "b": weight > 0}, large, coder=coder)
    command = [sys.executable, "-c", PEAK, str(small), str(large)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak < size.dense_bytes + 16 * size.bytes + (48 << 20)  # pieces of 2^20 to 2^23 symbols, whatever the file
