from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.core.sparse_file import CorruptFileError, load_sparse, save_sparse

DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex64, torch.complex128),
]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _forge(path: Path, entries: Any, payload: bytes = b"", *, version: int = 1) -> Path:
    """Write a file that is whole, checksum and all, but lies."""
    header = zlib.compress(json.dumps(entries).encode())
    body = struct.pack("<4sHI", b"LCSF", version, len(header)) + header + payload
    path.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
    return path


def _listed(**changes: Any) -> dict[str, Any]:
    return {"names": ["w"], "dtype": "float32", "shape": [8], "encoding": "dense", "nonzero": 8} | changes


def _decode_by_the_book(raw: bytes) -> dict[str, list[float]]:
    """Decode float32 tensors bit by bit, as the module's docstring describes the format."""
    header_length = int.from_bytes(raw[6:10], "little")
    position = 10 + header_length
    decoded = {}
    for entry in json.loads(zlib.decompress(raw[10:position])):
        count = 1
        for size in entry["shape"]:
            count *= size
        present = [True] * count
        if entry["encoding"] == "bitmap":
            present = [bool(raw[position + i // 8] >> (7 - i % 8) & 1) for i in range(count)]
            position += (count + 7) // 8
        values = []
        for here in present:
            values.append(struct.unpack_from("<f", raw, position)[0] if here else 0.0)
            position += 4 * here
        decoded.update(dict.fromkeys(entry["names"], values))
    assert zlib.crc32(raw[:position]) == int.from_bytes(raw[position:], "little")
    return decoded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, density: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(1, 100, (13, 17), generator=generator)
    tensor = (random * (torch.rand(13, 17, generator=generator) < density)).to(dtype)

    save_sparse({"w": tensor}, tmp_path / "f")
    loaded = load_sparse(tmp_path / "f")["w"]

    assert loaded.dtype == dtype
    assert loaded.shape == tensor.shape
    assert torch.equal(_bits(loaded), _bits(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.tensor(0.0),
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(1).expand(9),
        torch.eye(11)[:, ::2],
        torch.eye(7)[1:, 2:],
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}{tensor.stride()}",
)
def test_every_shape_and_memory_layout_comes_back(tensor: Tensor, tmp_path: Path) -> None:
    save_sparse({"w": tensor}, tmp_path / "f")
    loaded = load_sparse(tmp_path / "f")["w"]
    assert loaded.shape == tensor.shape
    assert torch.equal(loaded, tensor)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(width=32)), max_size=40), st.lists(st.integers(-3, 3), max_size=40))
def test_any_values_come_back(tmp_path_factory: pytest.TempPathFactory, floats: list[float], ints: list[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    state = {"floats": torch.tensor(floats), "ints": torch.tensor(ints, dtype=torch.int64)}
    save_sparse(state, path)
    loaded = load_sparse(path)
    assert torch.allclose(loaded["floats"], state["floats"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loaded["ints"], state["ints"])


def test_format_is_as_documented(tmp_path: Path) -> None:
    sparse, dense = torch.zeros(5, 5), torch.randn(2, 3)
    sparse[[0, 2, 4], [1, 0, 4]] = torch.tensor([1.5, -2.0, float("inf")])
    save_sparse({"sparse": sparse, "dense": dense, "tied": sparse}, tmp_path / "f")
    decoded = _decode_by_the_book((tmp_path / "f").read_bytes())
    expected = {"sparse": sparse, "tied": sparse, "dense": dense}
    assert decoded == {name: tensor.flatten().tolist() for name, tensor in expected.items()}


@pytest.mark.parametrize("nonzero", [0, 1, 50, 96, 97, 100])
def test_payload_is_the_cheaper_of_both_encodings(nonzero: int, tmp_path: Path) -> None:
    tensor = torch.zeros(100)
    tensor[:nonzero] = 7.0
    size = save_sparse({"w": tensor}, tmp_path / "f")
    raw = (tmp_path / "f").read_bytes()
    assert size == len(raw)
    assert size - 10 - int.from_bytes(raw[6:10], "little") - 4 == min(400, 13 + 4 * nonzero)


def test_minus_zero_is_a_zero_and_nan_is_not(tmp_path: Path) -> None:
    masked = torch.tensor([-0.5, float("nan"), 2.0]).repeat(20) * torch.tensor([0.0] * 59 + [1.0])
    masked[1] = float("nan")
    assert masked.signbit().any()
    save_sparse({"w": masked}, tmp_path / "f")
    loaded = load_sparse(tmp_path / "f")["w"]
    assert not loaded[~loaded.isnan()].signbit().any()
    assert torch.equal(loaded.isnan(), masked.isnan())
    assert loaded[-1] == 2.0


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(50, 50)
    once = save_sparse({"encoder": weight}, tmp_path / "once")
    tied = save_sparse({"encoder": weight, "decoder": weight, "part": weight[:25]}, tmp_path / "tied")
    loaded = load_sparse(tmp_path / "tied")
    assert loaded["encoder"] is loaded["decoder"]
    assert torch.equal(loaded["part"], weight[:25])
    assert tied - once < 25 * 50 * 4 + 100


def test_module_loads_strictly_from_what_was_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))

    torch.manual_seed(0)
    model, other = build(), build()
    save_sparse(model, tmp_path / "f")
    other.load_state_dict(load_sparse(tmp_path / "f"), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_every_truncation_and_a_flipped_bit_in_every_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "f"
    weight = torch.zeros(40)
    weight[7] = 3.0
    save_sparse({"w": weight, "b": torch.ones(2)}, path)
    raw = path.read_bytes()
    damaged = [raw[:length] for length in range(len(raw))]
    for position in range(len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << position % 8
        damaged.append(bytes(flipped))
    damaged.append(raw + b"\0")
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=str(path)):
            load_sparse(path)


def test_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(CorruptFileError, match=r"checkpoint\.pt is no sparse network file: it starts with b'PK"):
        load_sparse(path)


@pytest.mark.parametrize(
    ("entries", "payload", "message"),
    [
        ([_listed(shape=[10**9, 10**9])], b"\0" * 32, "truncated"),
        ([_listed(shape=[10**9, 10**9], encoding="bitmap")], b"\0" * 32, "truncated"),
        ([_listed(encoding="bitmap", nonzero=10**12)], b"\xff" * 33, "bitmap has another number"),
        ([_listed(encoding="bitmap", nonzero=3)], b"\x01" + b"\0" * 12, "bitmap has another number"),
        ([_listed()], b"\0" * 33, "1 bytes more"),
        ([_listed(dtype="load")], b"\0" * 32, "malformed header"),
        ([_listed(encoding="pickle")], b"\0" * 32, "malformed header"),
        ([_listed(shape=[-8])], b"\0" * 32, "malformed header"),
        ([_listed(shape=8)], b"\0" * 32, "malformed header"),
        ([{"names": ["w"]}], b"", "malformed header"),
        ({"w": 1}, b"", "malformed header"),
        (3, b"", "malformed header"),
    ],
)
def test_lying_header_is_refused_before_memory_is_taken(
    entries: Any, payload: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptFileError, match=message):
        load_sparse(_forge(tmp_path / "f", entries, payload))


def test_forged_file_without_a_lie_is_read(tmp_path: Path) -> None:
    assert load_sparse(_forge(tmp_path / "f", [_listed()], struct.pack("<8f", *range(8))))["w"].tolist() == [*range(8)]


def test_unknown_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="format version 7"):
        load_sparse(_forge(tmp_path / "f", [], version=7))


class _WithExtraState(nn.Linear):
    def get_extra_state(self) -> object:
        return {"codebook": 16}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (nn.Sequential(nn.ReLU(), _WithExtraState(2, 2)), r"'1\._extra_state' is a dict"),
        ({"w": torch.eye(3).to_sparse()}, "'w' has layout torch.sparse_coo"),
        ({"w": torch.empty(3, device="meta")}, "'w' has layout torch.strided on meta"),
        ({"w": torch.empty(3, dtype=torch.uint4)}, "'w' has dtype torch.uint4"),
    ],
)
def test_what_the_file_cannot_hold_is_refused_by_name(source: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_sparse(source, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "f"
    save_sparse({"w": torch.ones(3)}, path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_sparse({"w": torch.zeros(3)}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
    assert torch.equal(load_sparse(path)["w"], torch.ones(3))
