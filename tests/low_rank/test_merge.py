"""The factors are multiplied together again, and files rebuild layers of low rank in the dense class."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import load_compressed, save_compressed
from lightning_compress.core.records import RecordError
from lightning_compress.core.structure import following
from lightning_compress.low_rank.forms import FORMS
from lightning_compress.low_rank.merge import merge
from lightning_compress.low_rank.splits import Splits
from lightning_compress.replacement.layer import linear_map
from lightning_compress.replacement.record import note_replaced
from lightning_compress.replacement.swap import replaced, swap

PLAN: dict[str, tuple[str, dict[str, int]]] = {
    "0": ("spatial", {"rank": 5}),
    "2": ("channel", {"rank": 3}),
    "4": ("tucker", {"rank_in": 3, "rank_out": 2}),
    "7": ("linear", {"rank": 2}),
}


def dense(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    convs = [nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=2, bias=False), nn.Conv2d(6, 4, 3, stride=2)]
    return nn.Sequential(
        convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    ).double()


def thin(network: nn.Sequential) -> nn.Sequential:
    for path, (form, numbers) in PLAN.items():
        layer = network.get_submodule(path)
        values = Splits(linear_map(layer), None).values(form, tuple(numbers.values()))
        swap(layer, FORMS[form], numbers, values)
        note_replaced(layer, "low_rank")
    return network


def images() -> Tensor:
    return torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_the_merged_network_is_of_the_dense_class_and_computes_the_same() -> None:
    network = thin(dense())
    network[7].register_forward_hook(lambda *_: None)
    expected = network(images())
    merged = merge(network)
    assert merged is network
    assert {name: one.shape for name, one in merged.state_dict().items()} == {
        name: one.shape for name, one in dense().state_dict().items()
    }
    assert [type(one) for one in merged] == [type(one) for one in dense()]
    assert len(merged[7]._forward_hooks) == 1
    assert all(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(merged(images()), expected, rtol=1e-12, atol=1e-12)
    fresh = dense(1)
    fresh.load_state_dict(merged.state_dict())
    torch.testing.assert_close(fresh(images()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["state dict", "file", "pickle"])
def test_a_dense_network_becomes_the_one_that_was_saved(how: str, tmp_path: Path) -> None:
    network, fresh = thin(dense()).float(), dense(1).float()
    x = images().float()
    if how == "state dict":
        torch.save(network.state_dict(), tmp_path / "weights.pt")
        with following(fresh):
            fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    elif how == "file":
        save_compressed(network, tmp_path / "network.lcz")
        fresh = load_compressed(tmp_path / "network.lcz", fresh)
    else:
        torch.save(network, tmp_path / "network.pt")
        fresh = torch.load(tmp_path / "network.pt", weights_only=False)
    assert {path: (one.form, one.numbers) for path, one in replaced(fresh).items()} == PLAN
    torch.testing.assert_close(fresh(x), network(x), rtol=0, atol=0)


def test_a_dense_state_dict_brings_the_dense_network_back() -> None:
    network, other = thin(dense()), dense(1)
    network.load_state_dict(other.state_dict())
    torch.testing.assert_close(network(images()), other(images()), rtol=0, atol=0)


@pytest.mark.parametrize("numbers", [{"rank": 0}, {"rank": 99}, {"rank": True}, {"rank": 2.0}, {"n": 2}, {}])
def test_a_crafted_record_is_refused(numbers: dict[str, Any]) -> None:
    state, fresh = thin(dense()).state_dict(), dense(1)
    record = state._metadata["7"]["lightning_compress.structure"]["low_rank"]  # type: ignore[attr-defined]
    record["numbers"] = numbers
    before = copy.deepcopy(fresh.state_dict())
    with following(fresh), pytest.raises(RecordError, match=r"with which no linear layer of shape \(5, 16\) takes"):
        fresh.load_state_dict(state)
    assert not replaced(fresh)
    assert all(torch.equal(one, before[name]) for name, one in fresh.state_dict().items())


def test_there_must_be_something_to_merge() -> None:
    with pytest.raises(ValueError, match="No layer of Sequential is of low rank"):
        merge(dense())


def test_what_shares_a_factor_is_not_merged_and_all_stays() -> None:
    network = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    network[2].weight = network[0].weight
    swap(network[1], FORMS["linear"], {"rank": 1})
    swap(network[0], FORMS["tied_embedding"], {"rank": 2})
    swap(network[2], FORMS["tied_linear"], {"rank": 2})
    with pytest.raises(ValueError, match="no single weight computes both"):
        merge(network)
    assert list(replaced(network)) == ["0", "1", "2"]
