"""Replaced layers in state dicts and files: another process rebuilds them, and checks what it reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.forms import Mirrored, TwoParts, factored, recorded_forms, replace
from torch import Tensor, nn

from lightning_compress import cut, load_compressed, save_compressed
from lightning_compress.channels.find import channel_groups
from lightning_compress.core.records import KEY, RecordError
from lightning_compress.core.structure import follow, following
from lightning_compress.low_rank.record import LowRankStructure
from lightning_compress.replacement.plan import parameters_left
from lightning_compress.replacement.record import follow_layers, follow_replaced, note_replaced
from lightning_compress.replacement.swap import replaced, swap


@pytest.fixture(autouse=True)
def forms() -> Iterator[None]:
    with recorded_forms():
        yield


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))


def dense(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 9, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    ).eval()


RANKS = {"3": 4, "6": 5}


def thin(seed: int = 0) -> nn.Module:
    return replace(dense(seed), RANKS)


def cut_in_half(net: nn.Module) -> nn.Module:
    free = [one for one in channel_groups(net, images()) if one.frozen is None and one.exact]
    return cut(net, images(), keep={one.name: range(one.size // 2) for one in free})


def again(net: nn.Module, tmp_path: Path, *, how: str = "lcz", into: nn.Module | None = None) -> nn.Module:
    path = tmp_path / f"net.{how}"
    if how == "pt":
        torch.save(net.state_dict(), path)
    else:
        save_compressed(net, path)
    loaded = load_compressed(path, dense(5) if into is None else into).eval()
    assert torch.equal(loaded(images()), net(images()))
    assert loaded.state_dict()._metadata == net.state_dict()._metadata
    return loaded


@pytest.mark.parametrize("how", ["lcz", "pt"])
def test_files_replace_the_layers_of_the_dense_class(how: str, tmp_path: Path) -> None:
    loaded = again(thin(), tmp_path, how=how)
    torch.testing.assert_close(dict(replaced(loaded)["3"].numbers), {"rank": 4})
    assert list(replaced(loaded)) == list(RANKS)
    again(loaded, tmp_path, how=how)


def test_a_load_draws_no_random_numbers() -> None:
    net, other = thin(), dense(3)
    before = torch.get_rng_state()
    with following(other):
        other.load_state_dict(net.state_dict())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("order", ["cut first", "replaced first", "both times"])
def test_cuts_come_before_and_after(order: str, tmp_path: Path) -> None:
    net = dense()
    if order != "replaced first":
        cut_in_half(net)
    replace(net, {"3": 2, "6": 2})
    if order != "cut first":
        cut_in_half(net)
        assert (net[3].first.out_channels, net[6].first.out_features) == (1, 1)  # the rank is cut as well
    loaded = again(net, tmp_path)
    again(loaded, tmp_path)
    layer, own = loaded[3], net[3]
    width = 2 if order == "both times" else 4
    assert (layer.in_channels, layer.out_channels) == (own.in_channels, own.out_channels) == (width, width)


@pytest.mark.parametrize("order", ["plain", "cut first", "replaced first"])
@pytest.mark.parametrize("reloaded", [False, True])
def test_the_state_dict_of_the_dense_network_brings_the_layers_back(order: str, reloaded: bool, tmp_path: Path) -> None:
    net = dense()
    if order == "cut first":
        cut_in_half(net)
    replace(net, {"3": 2, "6": 2})
    if order == "replaced first":
        cut_in_half(net)
    net = again(net, tmp_path) if reloaded else net
    net.double().load_state_dict(dense(4).state_dict())
    assert not replaced(net)
    torch.testing.assert_close(net.float()(images()), dense(4)(images()))
    net(images()).sum().backward()
    assert all(one.grad is not None for one in net.parameters())
    assert all(isinstance(one, nn.Parameter) for one in net.parameters())


def test_other_numbers_replace_a_layer_anew() -> None:
    one, other = replace(dense(), {"3": 4}), replace(dense(1), {"3": 2, "6": 5})
    follow(one)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(images()), other(images()))
    assert replaced(one)["3"].numbers == {"rank": 2}


def test_a_plain_class_is_told_what_was_replaced() -> None:
    state = thin().state_dict()
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing key.*load_compressed replaces the same layers in a new Sequential"
    ):
        dense().load_state_dict(state)
    with pytest.warns(UserWarning, match="other layers at 3, 6, whose tensors it has not taken"):
        dense().load_state_dict(state, strict=False)


def test_a_part_of_a_network_is_saved_and_loaded_by_itself() -> None:
    net, layer = thin(), dense(2)[6]
    with following(layer):
        layer.load_state_dict(net[6].state_dict())
    x = torch.randn(2, 72)
    assert torch.equal(layer(x), net[6](x))


def test_copies_follow_with_and_without_values() -> None:
    net, average = dense(), dense()
    replace(net, RANKS)
    follow_layers(average, net, values=True)
    assert torch.equal(average(images()), net(images()))
    late = dense(3)
    follow_replaced(late, net)
    late.load_state_dict(dict(thin(1).state_dict()))  # without metadata, as an average's state is saved
    assert torch.equal(late(images()), thin(1)(images()))
    twice = copy.deepcopy(late)
    assert list(twice.state_dict()) == list(late.state_dict())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x))


def test_tied_layers_are_rebuilt_tied(tmp_path: Path) -> None:
    net, ids = Tied(), torch.tensor([[0, 3, 6]])
    tall, wide = factored(net.embed, 3).values()
    swap(net.embed, TwoParts, {"rank": 3}, {"first.weight": tall, "second.weight": wide})
    swap(net.out, Mirrored, {"rank": 3}, {"first.weight": wide.t(), "second.weight": tall})
    for one in (net.embed, net.out):
        note_replaced(one, "low_rank")
    save_compressed(net, tmp_path / "net.lcz")
    loaded = load_compressed(tmp_path / "net.lcz", Tied())
    assert loaded.out.second.weight is loaded.embed.first.weight
    assert torch.equal(loaded(ids), net(ids))
    loaded.load_state_dict(Tied().state_dict())
    assert loaded.out.weight is loaded.embed.weight


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"form": "other"}, "has the form 'other'; expected one of two_parts"),
    ({"form": ["two_parts"]}, "has the form"),
    ({"more": 1}, "has the form"),
    ({"numbers": [3]}, "has the numbers"),
    ({"numbers": {"rank": 10**9}}, "rank must be from 1 to 8; got 1000000000"),
    ({"numbers": {"rank": 0}}, "got 0"),
    ({"numbers": {"rank": True}}, "got True"),
    ({"numbers": {"rank": {"a": 1}}}, "plain values"),
    ({"numbers": {}}, "rank"),
    ({"of": None}, "has the sizes None"),
    ({"of": {"kind": "conv"}}, "has the sizes"),
    ({"of.kind": "linear"}, "has the sizes"),
    ({"of.kind": []}, "has the sizes"),
    ({"of.shape": [8, 8, 5, 5]}, "Load it into the class"),
    ({"of.shape": [4, 8, 3, 3]}, "Load it into the class"),
    ({"of.shape": [2**40, 8, 3, 3]}, "has the sizes"),
    ({"of.shape": [8, 8, 3, -3]}, "has the sizes"),
    ({"of.shape": "8833"}, "has the sizes"),
    ({"of.stride": [1, 1]}, "another stride"),
    ({"of.stride": [0, 1]}, "has the sizes"),
    ({"of.groups": 3}, "has the sizes"),
    ({"of.groups": 0}, "has the sizes"),
    ({"of.bias": 1}, "has the sizes"),
    ({"of.padding_mode": "mirror"}, "has the sizes"),
    ({"of.padding_idx": 0}, "has the sizes"),
]


@pytest.mark.parametrize(
    ("change", "match"), HOSTILE, ids=[f"{k} {n}" for n, (one, _) in enumerate(HOSTILE) for k in one]
)
def test_hostile_records_are_refused_and_change_nothing(change: dict[str, Any], match: str) -> None:
    state = thin().state_dict()
    record = copy.deepcopy(state._metadata["3"][KEY]["low_rank"])
    for name, value in change.items():
        inner, _, field = name.rpartition(".")
        (record[inner] if inner else record)[field] = value
    state._metadata["3"][KEY]["low_rank"] = record
    net = dense(2)
    before, keys = net(images()), list(net.state_dict())
    with following(net), pytest.raises(RecordError, match=match):
        net.load_state_dict(state)
    assert list(net.state_dict()) == keys
    assert torch.equal(net(images()), before)


def test_a_record_can_not_ask_for_much_memory() -> None:
    """A form may have numbers whose size its own check leaves open."""

    class Open(TwoParts):
        form = "open"

        @classmethod
        def check(cls, of: Any, numbers: Any) -> None:
            pass

    net = thin()
    state = net.state_dict()
    record = state._metadata["6"][KEY]["low_rank"]
    fresh = dense(2)
    with patch.object(LowRankStructure, "forms", {"open": Open}), following(fresh):
        for rank in (10**9, 10**30):
            state._metadata["6"][KEY]["low_rank"] = dict(record) | {"form": "open", "numbers": {"rank": rank}}
            state._metadata["3"].pop(KEY, None)
            with pytest.raises(RecordError, match="takes the form 'open'"):
                fresh.load_state_dict(state)


def test_the_share_of_the_parameters_counts_what_was_tied_once() -> None:
    net = Tied()
    dense_size = sum(one.numel() for one in net.parameters())
    tall, wide = factored(net.embed, 1).values()
    swap(net.embed, TwoParts, {"rank": 1}, {"first.weight": tall, "second.weight": wide})
    swap(net.out, Mirrored, {"rank": 1}, {"first.weight": wide.t(), "second.weight": tall})
    assert parameters_left(net) == sum(one.numel() for one in net.parameters()) / dense_size


def test_a_record_for_what_is_no_layer_is_refused() -> None:
    state = thin().state_dict()
    state._metadata["4"][KEY] = {"low_rank": copy.deepcopy(state._metadata["3"][KEY]["low_rank"])}
    net = dense(2)
    with (
        following(net),
        pytest.raises(RecordError, match="layer '4' was replaced, which this network's can't be: it is a"),
    ):
        net.load_state_dict(state)
    assert not replaced(net)
