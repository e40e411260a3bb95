"""Sorted channels: the important ones come first, and the network computes what it did."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.reference import randomize, run, to_double
from support.zoo import ZOO
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.channels.find import ChannelGroup, ChannelGroups, channel_groups
from lightning_compress.core.tensors import named_tensors
from lightning_compress.slimmable.norms import give_norms
from lightning_compress.slimmable.order import magnitudes, sort_channels


def shuffled(network: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.randperm(group.size, generator=generator).double() for group in groups}


@pytest.mark.parametrize(
    "name",
    [
        *("densenet", "shufflenet v2", "grouped", "transposed", "group norm", "lstm", "tied autoencoder", "llama"),
        *("multi-head attention of torch", "gpt2", "bare parameters", "generator"),
    ],
)
def test_any_order_is_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    network = randomize(ZOO[name].make(), seed=1).double().eval()
    inputs = to_double(ZOO[name].inputs())
    for parameter in network.parameters():
        parameter.grad = parameter.detach().clone()
    ids = {key: id(one) for key, one in network.named_parameters()}
    before = {key: tensor.clone() for key, tensor in named_tensors(network).items()}
    expected = run(network, inputs)
    assert sort_channels(network, channel_groups(network, inputs), inputs, shuffled, allow_inexact=True) == []
    for got, other in zip(tree_leaves(run(network, inputs)), tree_leaves(expected), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-12, atol=1e-12 * float(other.abs().max()))
    assert {key: id(one) for key, one in network.named_parameters()} == ids
    assert all(torch.equal(one, one.grad) for one in network.parameters())
    changed = [key for key, tensor in named_tensors(network).items() if not torch.equal(tensor, before[key])]
    assert changed


def by_hand() -> tuple[nn.Module, Tensor, ChannelGroups]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).double()
    nn.init.uniform_(network[1].weight)
    inputs = torch.randn(2, 2, 4, 4, dtype=torch.double)
    return network.eval(), inputs, channel_groups(network, inputs)


def test_magnitude_is_scale_times_what_reads() -> None:
    network, inputs, groups = by_hand()
    score = network[1].weight.abs() * network[4].weight.abs().view(3, 6, 4).sum((0, 2))
    torch.testing.assert_close(magnitudes(network, groups.free())["0"], score.detach())
    first = network[0].weight[score.argmax()].detach().clone()
    sort_channels(network, groups, inputs)
    assert torch.equal(network[0].weight[0], first)
    sorted_ = network[1].weight.abs() * network[4].weight.abs().view(3, 6, 4).sum((0, 2))
    torch.testing.assert_close(sorted_, score.sort(descending=True).values)


def test_nothing_is_sorted_without_an_order() -> None:
    network, inputs, groups = by_hand()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    assert sort_channels(network, groups, inputs, None) == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_an_inexact_group_keeps_its_order_unless_allowed() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.randn(2, 3)
    groups = channel_groups(network, inputs)
    before = network[0].weight.detach().clone()
    sort_channels(network, groups, inputs, shuffled)
    assert torch.equal(network[0].weight, before)
    sort_channels(network, groups, inputs, shuffled, allow_inexact=True)
    assert not torch.equal(network[0].weight, before)


def test_a_group_whose_order_matters_stays_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)),
    ).double()
    inputs = torch.randn(2, 3, dtype=torch.double)
    groups = ChannelGroups(
        replace(one, members=tuple(each for each in one.members if each.tensor != "2.weight"))
        if one.name == "0"
        else one
        for one in channel_groups(network, inputs)
    )
    first, second = network[0].weight.detach().clone(), network[2].weight.detach().clone()
    expected = network(inputs)
    with caplog.at_level(logging.WARNING):
        assert sort_channels(network, groups, inputs, shuffled) == ["0"]
    assert "The channels of 0 keep their order" in caplog.text
    assert torch.equal(network[0].weight, first)
    assert not torch.equal(network[2].weight, second)
    torch.testing.assert_close(network(inputs), expected, rtol=1e-12, atol=1e-12)


def test_bad_orders_leave_the_network_as_it_was() -> None:
    network, inputs, groups = by_hand()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"order is 'magnitude', a function .*; got 'taylor'"):
        sort_channels(network, groups, inputs, "taylor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"order must return 6 numbers for '0', one for each channel; got \(5,\)"):
        sort_channels(network, groups, inputs, lambda net, some: {"0": torch.zeros(5)})
    with pytest.raises(ValueError, match="6 numbers for '0', one for each channel; got none"):
        sort_channels(network, groups, inputs, lambda net, some: {})
    give_norms(network, groups, [0.5])
    with pytest.raises(ValueError, match="has widths already"):
        sort_channels(network, groups, inputs)
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in before.items())
