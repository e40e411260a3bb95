"""Files made by hand with a valid checksum, field by field: one error, the model as it was, little memory and time.

The records of cuts are attacked in tests/channels/test_cut_record.py.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.coding import CorruptFileError, load_compressed, save_compressed
from lightning_compress.coding.ans import AnsWriter
from lightning_compress.coding.bits import BitWriter, HuffmanWriter
from lightning_compress.coding.names import write_text
from lightning_compress.coding.patterns import DTYPES
from lightning_compress.coding.plain_values import to_bytes, varint
from lightning_compress.coding.streams import Writer

CODERS: dict[str, type[Writer]] = {"ans": AnsWriter, "huffman": HuffmanWriter, "none": BitWriter}
FLOAT, INT, BOOL = map(DTYPES.index, (torch.float32, torch.int64, torch.bool))


def sealed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")


def file_of(writer: Writer, *, coder: int = 0, version: int = 2, more: int = 0) -> bytes:
    raw = b"".join(writer.raw_pieces())
    return sealed(b"\x89LC" + bytes([version]) + varint(4 * (len(raw) + more) + coder) + raw + writer.finish())


def plain_text(writer: Writer, data: bytes, length: int | None = None) -> None:
    writer.uniform([0], 2)
    writer.number(len(data) if length is None else length)
    writer.raw(data)


def craft(
    names: bytes = b"weight",
    *,
    count: int = 1,
    text: Callable[[Writer, bytes], None] = write_text,
    tied: tuple[tuple[int, int], ...] = (),
    announced: int | None = None,
    dtype: int = FLOAT,
    dimensions: int | None = None,
    sizes: tuple[Any, ...] = (2,),
    tensors: int = 1,
    metadata: bytes | None = None,
    content: Callable[[Writer], None] = lambda writer: None,
    coder: str = "ans",
    **rest: Any,
) -> bytes:
    writer = CODERS[coder]()
    writer.number(count)
    text(writer, names)
    writer.number(len(tied) if announced is None else announced)
    for place, tensor in tied:
        writer.number(place)
        writer.number(tensor)
    for number in range(tensors):
        writer.uniform([int(dtype != FLOAT and not number)], 2)
        if dtype != FLOAT and not number:
            writer.uniform([dtype], len(DTYPES))
        writer.number(len(sizes) if dimensions is None else dimensions)
        for size in sizes:
            place, value = size if isinstance(size, tuple) else (0, size)
            writer.number(place)
            if not place:
                writer.number(value)
    writer.uniform([int(metadata is not None)], 2)
    if metadata is not None:
        write_text(writer, metadata)
    content(writer)
    return file_of(writer, coder=list(CODERS).index(coder), **rest)


def told(*calls: tuple[str, Any]) -> Callable[[Writer], None]:
    """Write numbers one after the other: ("u", (value, size)), ("n", value), ("z", value), ("raw", bytes)."""

    def write(writer: Writer) -> None:
        for kind, value in calls:
            if kind == "u":
                writer.uniform([value[0]], value[1])
            else:
                {"n": writer.number, "z": writer.signed, "raw": writer.raw}[kind](value)

    return write


A, B, C = (("u", (value, 3)) for value in range(3))  # one of three ways
VALUES: list[Any] = [None, True, -1, 7, 2**70, 0.5, "x", b"x", [], (), [1], ("a",), {}]


def attacks() -> Iterator[tuple[str, bytes]]:
    for coder in CODERS:
        for count in (0, 2, 3, 1000, 10**6, 2**31, 2**40, 2**63):
            yield f"{coder}: {count} names announced", craft(count=count, coder=coder)
        for length in (7, 100, 2**20, 2**31, 2**40, 2**62):
            yield (
                f"{coder}: text of {length} bytes announced",
                craft(text=lambda one, data, length=length: plain_text(one, data, length), coder=coder),
            )
        for names, count in (
            *((b"\xff\xfe", 1), (b"a\0a", 2), (b"a\0", 1), (b"\0", 1), (b"\0\0", 3), (b"a\0b\0a", 3), (b"", 0)),
            *((b"a" + 20_000 * b".a", 1), (b"." * 40_000, 1), (b"a" + 500_000 * b".a", 1), (b"a" * (1 << 26), 1)),
            *((b"\0" * (1 << 25), (1 << 25) + 1), (b"\0".join(b"%d" % i for i in range(100_000)), 100_000)),
        ):
            if coder != "ans" and len(names) > 10**6:
                continue  # that takes long to make
            wrong = names if names else b"x"
            data = craft(wrong, count=count, tensors=min(count, 3), sizes=(0,), coder=coder)
            yield f"{coder}: names {wrong[:10]!r} of {len(wrong)} bytes", data
        for what, tied in {
            "more than names": {"announced": 3},
            "to nothing": {"tied": ((0, 0),), "tensors": 0},
            "of nothing": {"tied": ((5, 0),)},
            "to the seventh": {"names": b"a\0b", "count": 2, "tied": ((1, 7),)},
            "to the second": {"names": b"a\0b", "count": 2, "tied": ((1, 1),)},
            "without end": {"announced": 2**40},
        }.items():
            yield f"{coder}: tied {what}", craft(**tied, coder=coder)  # type: ignore[arg-type]
        for dimensions in (65, 1000, 2**20, 2**40):
            yield f"{coder}: {dimensions} dimensions", craft(dimensions=dimensions, coder=coder)
        for sizes in (
            *((2**48,), (2**62,), (2**40, 0, 2**40), (0, 2**47, 2**47), (2**31, 2**31, 0, 2), (2**47, 2**47)),
            *((2**20, 2**20), (2**30,), (1 << 28, 4), tuple(range(2, 66)), ((1, 0),), (3, (2, 0)), (3, 3), (2**61, 0)),
        ):
            yield f"{coder}: shape {sizes[:6]}", craft(sizes=sizes, coder=coder)
        for coded in range(len(DTYPES)):
            yield f"{coder}: no content for {DTYPES[coded]}", craft(dtype=coded, sizes=(3000,), coder=coder)
        for version in (0, 3, 7, 255):
            yield f"{coder}: version {version}", craft(sizes=(0,), coder=coder, version=version)
        for more in (1, 2, 1000, 2**40, 2**61):
            yield f"{coder}: {more} raw bytes more", craft(sizes=(0,), coder=coder, more=more)
    for what, value in {
        **{f"{value!r}": value for value in VALUES if value not in ({}, [], ())},
        **{f"an entry {value!r}": {"": value} for value in VALUES if value != {}},
        **{f"a key {key!r}": {key: {}} for key in (None, 3, b"x", (1, 2), True)},
        **{f"a version {value!r}": {"": {"version": value}} for value in VALUES if value is not None and value != 7},
        **{f"extra states {value!r}": {"": {EXTRAS: value}} for value in VALUES if value != {}},
        "an extra state by a number": {"": {EXTRAS: {3: 1}}},
        "an extra state of another name": {"": {EXTRAS: {"bias": 1}}},
    }.items():
        if what not in ("a version -1", "a version True", f"a version {2**70}"):
            yield f"metadata: {what}", craft(sizes=(0,), metadata=to_bytes(value))
    deep = b"l\x01" * 40 + b"N"
    for what, data in {
        "nested 40 deep": deep,
        "a million Nones": b"l" + varint(10**6) + b"N" * 10**6,
        "a million dicts": b"l" + varint(10**6) + b"d\0" * 10**6,
        "a list without end": b"l" + varint(2**60),
        "a string without end": b"s" + varint(2**60) + b"x",
        "an integer without end": b"i" + varint(2**60),
        "an unknown kind": b"z",
        "nothing of a float": b"f\0",
        "no text": b"s\x01\xff",
        "something left": b"NN",
        "a number of 70 bits": b"l" + b"\xff" * 10,
        "a list as a key": b"d\x01l\0N",
        "an integer of 10 million digits": b"d\x01s\0d\x01s\x01xi" + varint(1 << 25) + b"\x01" * (1 << 25),
    }.items():
        yield f"metadata: {what}", craft(sizes=(0,), metadata=data)
    for what, dtype, sizes, calls in (
        ("a grid of integers", INT, (4,), [A, C, A]),
        ("a grid along no dimension", FLOAT, (), [A, C, B]),
        ("a grid along a third", FLOAT, (4,), [A, C, C]),
        ("a grid of one each", FLOAT, (4,), [A, C, B]),
        ("a grid beyond", FLOAT, (4,), [A, C, A, ("z", -4000), ("n", 0), ("n", 0)]),
        ("a step beyond", FLOAT, (4,), [A, C, A, ("z", 0), ("n", 9999)]),
        ("a grid of many", FLOAT, (4,), [A, C, A, ("z", 0), ("n", 1), ("n", 4095)]),
        ("a codebook of many", FLOAT, (4,), [A, B, ("n", 2**40)]),
        ("a codebook of 4097", FLOAT, (4,), [A, B, ("n", 4096)]),
        ("integers as float16", INT, (4,), [A, A, B]),
        ("33 bits of float32", FLOAT, (4,), [A, A, C, ("n", 33)]),
        ("65 bits of int64", INT, (4,), [A, A, C, ("n", 65)]),
        ("raw without bytes", FLOAT, (4000,), [A, A, A]),
        ("more than is there", FLOAT, (4,), [A, A, A, ("raw", bytes(15))]),
        ("bytes behind", FLOAT, (4,), [A, A, A, ("raw", bytes(17))]),
        ("gaps of 14 bits", FLOAT, (4,), [C, ("n", 13)]),
        ("more gaps than entries", FLOAT, (4,), [C, ("n", 1), ("n", 5)]),
        (
            "gaps past the end",
            FLOAT,
            (2,),
            [C, ("n", 1), ("n", 2), ("u", (5, 6)), ("u", (3, 4)), ("u", (3, 4))],
        ),
        ("a learned map of a scalar", FLOAT, (), [B, ("u", (1, 2))]),
        ("a learned map of a huge tensor", FLOAT, (1 << 23, 1), [B, ("u", (1, 2))]),
        (
            "a learned map of many steps",
            FLOAT,
            (1 << 16, 1),
            [B, ("u", (1, 2)), *[("u", (0, 2))] * 2, ("u", (2, 64))],
        ),
        (
            "a learned map of no lag",
            FLOAT,
            (300,),
            [B, ("u", (1, 2)), *[("u", (0, 2))] * 2, ("u", (0, 64))],
        ),
        ("a table of high levels", FLOAT, (9,), [B, ("u", (0, 2)), ("u", (0, 6)), ("n", 9999)]),
        (
            "neither true nor false",
            DTYPES.index(torch.bool),
            (1,),
            [A, A, A, ("raw", b"\x07")],
        ),
    ):
        yield f"content: {what}", craft(dtype=dtype, sizes=sizes, content=told(*calls))


EXTRAS = "lightning_compress.extra_state"


@cache
def files() -> dict[str, bytes]:
    return dict(attacks())


class Net(nn.Linear):
    def get_extra_state(self) -> Any:
        return 1

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def refused(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    model = Net(1, 2, bias=False)
    weight, before = model.weight, model.weight.detach().clone()
    attributes = set(vars(model))
    with pytest.raises(CorruptFileError, match="f is corrupt: "):
        load_compressed(path, model)
    assert model.weight is weight
    assert torch.equal(weight, before)
    assert set(vars(model)) == attributes


def test_there_are_at_least_two_hundred() -> None:
    assert len(files()) == len(list(attacks())) >= 200


def test_what_is_crafted_is_otherwise_a_file(tmp_path: Path) -> None:
    for coder in CODERS:
        (tmp_path / "f").write_bytes(craft(sizes=(0, 3), metadata=to_bytes({"": {"kept": [1]}}), coder=coder))
        loaded = load_compressed(tmp_path / "f")
        assert loaded["weight"].shape == (0, 3)
        assert loaded._metadata[""] == {"kept": [1]}


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes there")
def test_every_crafted_file_is_refused_with_little_memory_and_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.coding.test_crafted_files", str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 150 << 20, "bytes of memory: 16 MiB and 16 times the file, several times over"


def _refuse_all(path: Path) -> None:
    everything = files()
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # of all together
    refused(everything["ans: 2 names announced"], path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, data in everything.items():
        try:
            refused(data, path)
        except BaseException as error:
            raise AssertionError(what) from error
    sys.stdout.write(str(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


# ---------------------------------------------------------------------- what the reader refuses, the writer does too


@pytest.mark.parametrize(
    "names",
    [["a" + ".a" * 20_000], ["x" * (1 << 25)], [f"l.{i}" for i in range(20_000)]],
    ids=["dots", "long", "many"],
)
def test_names_that_the_reader_would_refuse_are_refused_by_the_writer(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The names of [\d,]+ tensors and .* take [\d,]+ bytes of memory"):
        save_compressed({name: torch.zeros(()) for name in names}, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_metadata_that_the_reader_would_refuse_are_refused_by_the_writer(tmp_path: Path) -> None:
    state = nn.Linear(1, 1).state_dict()
    state._metadata[""]["kept"] = [None] * 300_000
    with pytest.raises(ValueError, match=r"tensors and the state dict.s metadata take"):
        save_compressed(state, tmp_path / "f")
    state._metadata[""] = {"version": "new"}
    with pytest.raises(ValueError, match=r"have the version .new.; it must be an integer"):
        save_compressed(state, tmp_path / "f")


@pytest.mark.parametrize("names", [["a" + ".b" * 1000], ["x" * 100_000], [f"layer.{i}.weight" for i in range(5000)]])
def test_names_within_the_limit_come_back(names: list[str], tmp_path: Path) -> None:
    save_compressed({name: torch.full((), float(i)) for i, name in enumerate(names)}, tmp_path / "f")
    assert [float(one) for one in load_compressed(tmp_path / "f").values()] == np.arange(len(names)).tolist()


def test_a_file_that_declares_too_much_is_refused_and_says_how_to_load_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(craft(sizes=(20_000, (1, 0))))
    with pytest.raises(CorruptFileError, match=r"more than the 1073741824 that max_bytes .* max_bytes=16\d+"):
        load_compressed(tmp_path / "f")


if __name__ == "__main__":
    _refuse_all(Path(sys.argv[1]))
