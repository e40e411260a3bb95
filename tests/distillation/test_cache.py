"""The cache against a teacher that is asked anew, and checksums against the bytes themselves."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_compress.distillation.cache import Indexed, OutputCache, checksums


class Counted(nn.Module):
    """A teacher that counts the samples it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.asked = nn.Linear(4, 3), 0

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.layer(x)


def ask(cache: OutputCache, teacher: Counted, index: Tensor, x: Tensor) -> Tensor:
    keys = checksums([x], len(x))
    outputs = cache.lookup(index, keys)
    if outputs is None:
        outputs = teacher(x)
        cache.store(index, keys, outputs)
    return outputs


def test_three_shuffled_epochs_ask_the_teacher_once() -> None:
    x = torch.randn(103, 4)
    loader = DataLoader(Indexed(TensorDataset(x, torch.arange(103))), batch_size=10, shuffle=True)
    cache, teacher = OutputCache(), Counted()
    for _ in range(3):
        for inputs, y, index in loader:
            assert index.equal(y)
            torch.testing.assert_close(ask(cache, teacher, index, inputs), teacher.layer(inputs))
    assert teacher.asked == len(cache) == 103


def test_a_batch_with_unknown_samples_is_computed_and_what_was_known_stays() -> None:
    x, cache, teacher = torch.randn(2000, 4), OutputCache(), Counted()
    first = ask(cache, teacher, torch.tensor([1000, 3]), x[[1000, 3]])
    assert cache.lookup(torch.tensor([3, 4]), checksums([x[3:5]], 2)) is None
    nn.init.zeros_(teacher.layer.weight)
    ask(cache, teacher, torch.tensor([3, 1999]), x[[3, 1999]])
    assert len(cache) == 3
    found = cache.lookup(torch.tensor([3, 1000, 3]), checksums([x[[3, 1000, 3]]], 3))
    assert found is not None
    assert found.equal(first[[1, 0, 1]])
    found.zero_()  # the caller's own
    again = cache.lookup(torch.tensor([3]), checksums([x[3:4]], 1))
    assert again is not None
    assert again.equal(first[1:])


def test_a_sample_that_is_drawn_twice_is_kept_once() -> None:
    x, cache = torch.randn(1, 4).expand(3, 4), OutputCache()
    index, keys = torch.tensor([6, 6, 6]), checksums([x], 3)
    cache.store(index, keys, torch.ones(3, 2))
    found = cache.lookup(index, keys)
    assert found is not None
    assert found.equal(torch.ones(3, 2))
    assert len(cache) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_outputs_come_back_as_they_were(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, outputs = torch.arange(300), (100 * torch.randn(300, *shape)).to(dtype)
    order, cache = torch.randperm(300), OutputCache()
    for index in order.split(7):
        cache.store(
            index.int(), checksums([x[index]], len(index)), outputs[index].requires_grad_(dtype.is_floating_point)
        )
    found = cache.lookup(torch.arange(300), checksums([x], 300))
    assert found is not None
    assert found.dtype == dtype
    assert found.equal(outputs)
    assert not found.requires_grad


def test_another_input_is_refused() -> None:
    x, cache = torch.randn(8, 1, 5, 5), OutputCache()
    index = torch.arange(8) + 40
    cache.store(index, checksums([x], 8), torch.zeros(8, 2))
    flipped = x.clone()
    flipped[[2, 5]] = x[[2, 5]].flip(-1)
    match = r"sample 42 .* \(2 of 8 .*Random augmentation .* switch it off, or switch the cache off"
    with pytest.raises(ValueError, match=match):
        cache.lookup(index, checksums([flipped], 8))
    with pytest.raises(ValueError, match=match):
        cache.store(index, checksums([flipped], 8), torch.zeros(8, 2))
    with pytest.raises(ValueError, match=r"sample 42 .*\(2 of 8"):  # although the other batch is not all known
        cache.lookup(torch.cat([index, index + 8]), checksums([torch.cat([flipped, x])], 16))
    with pytest.raises(ValueError, match=r"sample 9 "):
        cache.store(torch.tensor([9, 9]), checksums([x[:2]], 2), torch.zeros(2, 2))


def same(*inputs: Tensor) -> bool:
    """Whether two samples have one checksum, the inputs given as pairs."""
    first, second = checksums(inputs, 2).tolist()
    return bool(first == second)


DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_and_its_place_count(dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    base = torch.randint(0, 2, (13 * size,), dtype=torch.uint8)
    seen = {checksums([base.view(dtype)[None]], 1).item()}
    for i in range(len(base)):
        for change in (1,) if dtype == torch.bool else (1, 2, 128):
            changed = base.clone()
            changed[i] ^= change
            seen.add(checksums([changed.view(dtype)[None]], 1).item())
    assert len(seen) == 1 + len(base) * (1 if dtype == torch.bool else 3)


def test_changes_that_simple_sums_do_not_see() -> None:
    x = torch.randn(1, 4, 6)
    changed = [
        -x,
        x.flip(1),
        x.flip(2),
        x.roll(1, 2),
        x.roll(2, 1),
        x.transpose(1, 2).reshape(1, 4, 6),
        x[:, [1, 0, 2, 3]],
    ]
    assert not any(same(torch.cat([x, other])) for other in changed)
    signs = x.clone()
    signs[0, 0, [1, 3]] *= -1  # the top bits of two words
    assert not same(torch.cat([x, signs]))
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert checksums([a, b], 2).ne(checksums([b, a], 2)).all()
    zeros = torch.zeros(1, 12)
    others = (zeros[:, :9], zeros.bool(), zeros.view(1, 3, 4), zeros.long())
    assert len({checksums([z], 1).item() for z in (zeros, *others)}) == 5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=7, max_size=7), min_size=1, max_size=20))
def test_samples_have_one_checksum_where_their_bytes_are_one(samples: list[bytes]) -> None:
    x = torch.tensor([list(sample) for sample in samples], dtype=torch.uint8)
    keys = checksums([x], len(x)).tolist()
    for one, key in zip(samples, keys, strict=True):
        assert [other == key for other in keys] == [other == one for other in samples]
    alone = [checksums([row[None]], 1).item() for row in x]
    assert keys == alone


def test_layout_in_memory_does_not_count() -> None:
    x = torch.randn(6, 3, 4, 5)
    keys = checksums([x], 6)
    assert checksums([x.to(memory_format=torch.channels_last)], 6).equal(keys)
    assert checksums([torch.stack([x, x], -1)[..., 0]], 6).equal(keys)
    assert checksums([x.double()[1:].float().requires_grad_()], 5).equal(keys[1:])
    assert checksums([torch.cat([x.flatten(), x.flatten()])[1:][359:719].view(6, 3, 4, 5)], 6).equal(keys)
    row = torch.randn(1, 1).expand(6, 4)
    assert checksums([row], 6).equal(checksums([row.clone()], 6))
    odd = torch.arange(20.0).as_strided((1, 1), (5, 7))
    assert checksums([odd], 1).equal(checksums([torch.zeros(1, 1)], 1))


def test_only_inputs_that_hold_the_batch_count() -> None:
    x, keys = torch.randn(5, 2), checksums([torch.arange(5)], 5)
    assert checksums([torch.arange(5), torch.randn(3), torch.tensor(2.0)], 5).equal(keys)
    assert not checksums([torch.arange(5), x], 5).equal(keys)
    assert checksums([torch.zeros(0, 3)], 0).shape == (0,)
    with pytest.raises(ValueError, match=r"\[\(5, 2\)\] hold no batch of 4"):
        checksums([x], 4)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (torch.tensor([0.0, 1.0]), "torch.float32.*Indexed"),
        (torch.tensor([True, False]), "torch.bool"),
        (torch.tensor([0]), r"\(1,\).*2 samples"),
        (torch.tensor([0, -3]), "-3 is negative"),
    ],
)
def test_bad_indices(index: Tensor, words: str) -> None:
    keys = checksums([torch.randn(2, 3)], 2)
    for call in (lambda c: c.lookup(index, keys), lambda c: c.store(index, keys, torch.zeros(2, 1))):
        with pytest.raises(ValueError, match=words):
            call(OutputCache())


def test_bad_outputs() -> None:
    index, keys, cache = torch.arange(2), checksums([torch.randn(2, 3)], 2), OutputCache()
    with pytest.raises(ValueError, match=r"\(3, 1\).*2 samples"):
        cache.store(index, keys, torch.zeros(3, 1))
    cache.store(index, keys, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"\(7,\).*\(5,\).*Pad"):
        cache.store(index, keys, torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"float64.*float32"):
        cache.store(index, keys, torch.zeros(2, 5).double())


class Samples(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_samples_of_every_kind_carry_their_index() -> None:
    pair = namedtuple("pair", "x y")
    x = torch.tensor(3.0)
    dataset = Indexed(Samples([x, (x, 4), [x, 4], pair(x, 4), {"x": x}]))
    assert [dataset[i] for i in range(len(dataset))] == [(x, 0), (x, 4, 1), (x, 4, 2), (x, 4, 3), {"x": x, "index": 4}]
    (batch,) = DataLoader(Indexed(Samples([{"x": x}, {"x": x}]), key="row"), batch_size=2)
    assert batch["row"].equal(torch.tensor([0, 1]))


def test_datasets_without_an_index() -> None:
    with pytest.raises(ValueError, match="'index' already"):
        Indexed(Samples([{"index": 0}]))[0]
    with pytest.raises(ValueError, match="IterableDataset"):
        Indexed(Stream())
