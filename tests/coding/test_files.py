"""One file: every dtype, shape and kind of values comes back, structure too, and a failed write harms nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from lightning_compress.channels.cut import cut
from lightning_compress.coding import CorruptFileError, load_compressed, save_compressed
from lightning_compress.coding.files import read_compressed
from lightning_compress.coding.footprint import file_bytes, footprint

DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex64, torch.complex128),
]
CODERS = ["ans", "huffman", "none"]


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, density: float, coder: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(1, 100, (13, 17), generator=generator)
    tensor = (random * (torch.rand(13, 17, generator=generator) < density)).to(dtype)

    save_compressed({"w": tensor}, tmp_path / "f", coder=coder)
    loaded = load_compressed(tmp_path / "f")["w"]

    assert loaded.dtype == dtype
    assert loaded.shape == tensor.shape
    assert torch.equal(bits(loaded), bits(tensor))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.tensor(0.0),
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.arange(12.0).reshape(3, 4).t(),
        normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(1).expand(9),
        torch.eye(11)[:, ::2],
        torch.eye(7)[1:, 2:],
        torch.randn(3, dtype=torch.complex64).conj(),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}{tensor.stride()}",
)
def test_every_shape_and_memory_layout_comes_back(tensor: Tensor, coder: Any, tmp_path: Path) -> None:
    save_compressed({"w": tensor}, tmp_path / "f", coder=coder)
    loaded = load_compressed(tmp_path / "f")["w"]
    assert loaded.shape == tensor.shape
    assert torch.equal(loaded, tensor)


WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("coder", CODERS)
@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from([dtype for dtype in DTYPES if dtype != torch.bool]),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
    pool=st.lists(st.integers(0, 255), min_size=1, max_size=64),
    zeros=st.sampled_from([0.0, 0.3, 0.95]),
    seed=st.integers(0, 2**31),
)
def test_any_bits_come_back_but_the_sign_of_zero(
    coder: Any, tmp_path_factory: pytest.TempPathFactory, dtype: Any, shape: Any, pool: Any, zeros: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) * dtype.itemsize
    octets = torch.tensor(pool, dtype=torch.uint8)[torch.randint(len(pool), (count,), generator=generator)]
    drop = torch.rand(count // dtype.itemsize, generator=generator) < zeros
    octets = octets.view(-1, dtype.itemsize).masked_fill(drop[:, None], 0).view(-1)
    tensor = octets.view(dtype).reshape(shape)
    path = tmp_path_factory.getbasetemp() / "any"
    save_compressed({"w": tensor}, path, coder=coder)
    loaded = load_compressed(path)["w"]
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    part = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    expected = bits(part.clone()).view(WORDS[part.dtype.itemsize]).clone()
    if part.is_floating_point():
        expected[expected == torch.tensor(-0.0).to(part.dtype).view(1).view(expected.dtype)[0]] = 0
    assert torch.equal(bits(loaded).view(expected.dtype), expected)


def test_a_nan_keeps_its_payload_and_minus_zero_becomes_zero(tmp_path: Path) -> None:
    patterns = torch.tensor([0x7FC00001, 0x7F800001, -0x3FFFFF, -0x80000000, 0x7F800000], dtype=torch.int32)
    save_compressed({"w": patterns.view(torch.float32)}, tmp_path / "f")
    loaded = load_compressed(tmp_path / "f")["w"].view(torch.int32)
    assert loaded.tolist() == [0x7FC00001, 0x7F800001, -0x3FFFFF, 0, 0x7F800000]


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    weight = normal(50, 50)
    once = save_compressed({"encoder": weight}, tmp_path / "once").bytes
    tied = save_compressed({"encoder": weight, "part": weight[:25], "decoder": weight}, tmp_path / "tied").bytes
    loaded = load_compressed(tmp_path / "tied")
    assert list(loaded) == ["encoder", "part", "decoder"]
    assert loaded["encoder"] is loaded["decoder"]
    assert torch.equal(loaded["part"], weight[:25])
    assert tied - once < 25 * 50 * 4 + 30


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def test_a_module_loads_strictly_and_its_metadata_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = build(), build()
    save_compressed(model, tmp_path / "f")
    state = load_compressed(tmp_path / "f")
    other.load_state_dict(state, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    expected = model.state_dict()._metadata
    assert {path: expected[path] for path in ("", "0", "1", "3")} == state._metadata
    assert not hasattr(load_compressed(_saved(dict(model.state_dict()), tmp_path)), "_metadata")


def _saved(state: Any, folder: Path) -> Path:
    save_compressed(state, folder / "g")
    return folder / "g"


def test_a_record_of_any_structure_travels(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    record = {"ranks": {"fc": (3, None, -(2**70))}, "shapes": [torch.Size([2, 3]), 0.5, b"x", True], 4: "ü"}
    state._metadata[""]["lightning_compress"] = record
    loaded = load_compressed(_saved(state, tmp_path))
    assert loaded._metadata[""]["lightning_compress"] == record
    state._metadata[""]["scale"] = torch.ones(2)
    with pytest.raises(ValueError, match="holds a Tensor"):
        _saved(state, tmp_path)


def test_a_thin_network_is_rebuilt_in_the_dense_class(tmp_path: Path) -> None:
    x = normal(3, 1, 4, 4)
    thin = cut(build().eval(), x, keep={"0": [0, 2]})
    save_compressed(thin, tmp_path / "f")
    other = load_compressed(tmp_path / "f", build().eval())
    assert other[0].weight.shape == (2, 1, 3, 3)
    assert torch.equal(other(x), thin(x))


def test_a_lightning_checkpoint_and_a_state_dict_are_recognised(tmp_path: Path) -> None:
    model, other = build(), build()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    assert torch.equal(load_compressed(tmp_path / "last.ckpt", other)[0].weight, model[0].weight)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert torch.equal(load_compressed(tmp_path / "state.pt")["0.weight"], model[0].weight)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*none\.lcz"):
        load_compressed(tmp_path / "none.lcz")


def test_a_file_for_another_architecture_is_refused_with_what_does_not_fit(tmp_path: Path) -> None:
    save_compressed(build(), tmp_path / "f")
    other = nn.Sequential(nn.Conv2d(1, 3, 3))
    before = other[0].weight.clone()
    with pytest.raises(ValueError, match=r"f does not fit Sequential: .* has 1\.bias, .*0\.weight is \(4, 1, 3, 3\)"):
        load_compressed(tmp_path / "f", other)
    assert torch.equal(other[0].weight, before)


def test_half_rounds_what_is_left_and_nothing_else(tmp_path: Path) -> None:
    state = {
        "bias": normal(40),
        "table": normal(3)[torch.randint(3, (500,))],
        "large": torch.tensor([1e30, 1.0]),
        "grid": torch.randint(-7, 8, (20, 50)) * torch.rand(20, 1),
        "steps": torch.tensor(70_001),
    }
    whole = save_compressed(state, tmp_path / "whole").bytes
    half = save_compressed(state, tmp_path / "half", half=True).bytes
    loaded = load_compressed(tmp_path / "half")
    for name in ("bias", "table"):
        assert torch.equal(loaded[name], state[name].half().float()), name
    for name in ("large", "grid", "steps"):
        assert torch.equal(loaded[name], state[name]), name
    assert 80 <= whole - half <= 90


class _WithExtraState(nn.Linear):
    def get_extra_state(self) -> object:
        return {"codebook": object()}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (nn.Sequential(nn.ReLU(), _WithExtraState(2, 2)), r"'1\._extra_state', an extra state, holds a object"),
        ({"w": torch.eye(3).to_sparse()}, "'w' has layout torch.sparse_coo"),
        ({"w": torch.empty(3, device="meta")}, "'w' has layout torch.strided on device meta"),
        ({"w": torch.empty(3, dtype=torch.uint4)}, "'w' has dtype torch.uint4"),
        ({"a\0b": torch.ones(1)}, "NUL character"),
    ],
)
def test_what_the_file_cannot_hold_is_refused_by_name(source: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_compressed(source, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_an_unknown_coder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="coder='zip' is unknown; expected one of 'ans', 'huffman', 'none'"):
        save_compressed({}, tmp_path / "f", coder="zip")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "f"
    save_compressed({"w": torch.ones(3)}, path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_compressed({"w": torch.zeros(3)}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
    assert torch.equal(load_compressed(path)["w"], torch.ones(3))


def test_the_table_adds_up_to_the_file(tmp_path: Path) -> None:
    state = build().state_dict() | {"0.weight": normal(300, 100), "x": normal(400).sign()}
    written = save_compressed(state, tmp_path / "f")
    found = read_compressed(tmp_path / "f").size
    assert written.bytes == found.bytes == (tmp_path / "f").stat().st_size
    for told, read in zip(written.tensors, found.tensors, strict=True):
        assert told.encoding == read.encoding
        assert told.bytes == pytest.approx(read.bytes, abs=4)
    assert 0 < written.bytes - sum(tensor.bytes for tensor in written.tensors) < 100
    shown = str(written)
    assert "300 x 100" in shown
    assert f"{written.bytes:,} bytes" in shown


def test_the_formula_is_deep_compressions(tmp_path: Path) -> None:
    """The lecture's 4x4 matrix with 4 clusters: n b / (n log2 k + k b) = 16 * 32 / (16 * 2 + 4 * 32) = 3.2."""
    rows = [[0.5, 1.3, 4.3, -0.1], [0.1, -0.2, -1.2, 0.3], [1.0, 3.0, -0.4, 0.1], [-0.5, -0.1, -3.4, -5.0]]
    means = torch.tensor([-4.2, -0.4, 0.4, 2.9])
    nearest = (torch.tensor(rows)[..., None] - means).abs().argmin(-1)
    size = save_compressed({"w": means[nearest]}, tmp_path / "f")
    assert size.formula_rate == pytest.approx(3.2)
    assert size.rate == 64 / size.bytes


def test_tensors_beyond_max_bytes_are_refused(tmp_path: Path) -> None:
    save_compressed({"w": torch.zeros(1000, 1000)}, tmp_path / "f")
    assert load_compressed(tmp_path / "f", max_bytes=4_000_000)["w"].shape == (1000, 1000)
    with pytest.raises(CorruptFileError, match="take 4000000 bytes, more than the 3999999"):
        load_compressed(tmp_path / "f", max_bytes=3_999_999)


# ---------------------------------------------------------------------- tensors that are not what they seem


class Int8Weight(Tensor):
    """As torchao's: integers and scales, behind a tensor without memory."""

    @staticmethod
    def __new__(cls, q: Tensor, s: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)

    def __init__(self, q: Tensor, s: Tensor) -> None:
        self.q, self.s = q, s

    @classmethod
    def __torch_dispatch__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is torch.ops.aten.detach.default:
            return return_and_correct_aliasing(f, args, kwargs or {}, cls(args[0].q, args[0].s))
        values = tree_map(lambda x: x.q.float() * x.s if isinstance(x, Int8Weight) else x, (args, kwargs or {}))
        return f(*values[0], **values[1])


class Sealed(Int8Weight):
    """One that can't be asked for its values."""

    @classmethod
    def __torch_dispatch__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is torch.ops.aten.detach.default:
            return return_and_correct_aliasing(f, args, kwargs or {}, cls(args[0].q, args[0].s))
        raise NotImplementedError(f)


class Named(Tensor):
    """A subclass with memory of its own."""


def wrapped(kind: Any, seed: int) -> tuple[Tensor, Tensor]:
    q = torch.randint(-127, 128, (6, 6), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    s = torch.arange(1.0, 7.0)[:, None] / 10
    return kind(q, s), q.float() * s


def test_wrapped_weights_are_saved_with_their_values(tmp_path: Path) -> None:
    (one, first), (two, second) = wrapped(Int8Weight, 0), wrapped(Int8Weight, 1)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    for layer, weight in zip(net, (one, two), strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    save_compressed(net, tmp_path / "f")
    loaded = load_compressed(tmp_path / "f")
    assert torch.equal(loaded["0.weight"], first)
    assert torch.equal(loaded["1.weight"], second)
    cost = footprint(net, torch.ones(2, 6), repeats=1)
    assert cost.parameters == 72
    assert cost.nonzero == int((first != 0).sum() + (second != 0).sum())


def freed() -> Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


HOLLOW: dict[str, Any] = {
    "a wrapper": lambda: wrapped(Sealed, 0)[0],
    "fake": fake,
    "freed memory": freed,
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed rows": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "masked": lambda: torch.masked.masked_tensor(torch.ones(3), torch.tensor([True, False, True])),
    "lazy": lambda: nn.LazyLinear(2).weight,
    "a number": lambda: 3,
    "nothing": lambda: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", HOLLOW)
def test_a_tensor_without_its_values_in_memory_is_refused_by_name(what: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'second\.weight'"):
        save_compressed({"first": torch.ones(3), "second.weight": HOLLOW[what]()}, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_views_of_one_memory_with_other_values_are_told_apart(tmp_path: Path) -> None:
    z = torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    state = {
        "z": z,
        "conj": z.conj(),
        "imag": z.imag,
        "neg": z.conj().imag,
        "real": z.real,
        "bits": z.real.view(torch.int32),
    }
    state |= {"named": torch.arange(3.0).as_subclass(Named), "t": torch.ones(3, 2).cumsum(0), "again": z}
    state["transposed"] = state["t"].t()
    save_compressed(state, tmp_path / "f")
    loaded = load_compressed(tmp_path / "f")
    assert {name: one.tolist() for name, one in loaded.items()} == {name: one.tolist() for name, one in state.items()}
    assert loaded["z"] is loaded["again"]
    assert type(loaded["named"]) is Tensor


# ---------------------------------------------------------------------- what modules keep beside tensors


class Counting(nn.Linear):
    seen: Any = None

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


@pytest.mark.parametrize("form", ["compressed", "torch"])
@pytest.mark.parametrize("value", [{"n": 3, "names": ["a", ("b", None)], "rate": 0.5}, 7, None, "x", torch.arange(9)])
def test_extra_state_is_saved_and_loaded_as_torch_does(value: Any, form: str, tmp_path: Path) -> None:
    net, fresh, ours = (nn.Sequential(nn.ReLU(), Counting(2, 2)) for _ in range(3))
    net[1].seen, ours[1].seen = value, torch.arange(2)
    if form == "compressed":
        save_compressed(net, tmp_path / "f")
    else:
        torch.save(net.state_dict(), tmp_path / "f")
    fresh.load_state_dict(net.state_dict())
    load_compressed(tmp_path / "f", ours)
    assert type(ours[1].seen) is type(fresh[1].seen)
    assert torch.equal(ours[1].seen, value) if isinstance(value, Tensor) else ours[1].seen == value
    assert torch.equal(ours[1].weight, net[1].weight)
    assert file_bytes(net) > 0
    save_compressed(dict(net.state_dict()), tmp_path / "g")
    assert load_compressed(tmp_path / "g").keys() == net.state_dict().keys()


def test_a_load_does_not_replace_parameters(tmp_path: Path) -> None:
    net, other = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    state = net.state_dict()
    other.load_state_dict(state, assign=True)  # torch notes it in the metadata
    save_compressed(state, tmp_path / "f")
    fresh = nn.Sequential(nn.Linear(2, 2))
    before = fresh[0].weight
    load_compressed(tmp_path / "f", fresh)
    assert fresh[0].weight is before


def _in_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _deep(levels: int) -> Any:
    return [_deep(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({3: torch.ones(2)}, "The name 3 is not UTF-8 text"),
        ({"\ud800": torch.ones(2)}, r"'\\ud800' is not UTF-8 text"),
        ({"x": torch.ones([1] * 65)}, "'x' has the shape .* at most 64 dimensions"),
        ({"x": torch.empty(2**50, 0)}, "'x' has the shape .* below 281474976710656"),
        ({"_extra_state": _in_itself()}, "an extra state, holds values that are nested"),
        ({"_extra_state": _deep(40)}, "an extra state, holds values that are nested"),
    ],
    ids=["a number", "half a character", "many dimensions", "a huge one", "in itself", "deep"],
)
def test_what_could_not_be_read_again_is_not_written(state: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        save_compressed(state, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_the_deepest_value_that_is_written_comes_back(tmp_path: Path) -> None:
    for levels in range(40):
        try:
            save_compressed({"_extra_state": _deep(levels)}, tmp_path / "f")
        except ValueError:
            break
        assert load_compressed(tmp_path / "f")["_extra_state"] == _deep(levels)
    assert 20 < levels < 40
