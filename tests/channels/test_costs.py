"""Costs of channels, from networks that were built narrower, and counted by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.channels import costs
from lightning_compress.channels.costs import Cost, channel_costs
from lightning_compress.channels.find import channel_groups


class Net(nn.Module):
    """A residual stream, a branch, and a head; all widths are free."""

    def __init__(self, stream: int = 6, branch: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, stream, 3, padding=1, bias=False), nn.BatchNorm2d(stream)
        self.up, self.down = nn.Conv2d(stream, branch, 1), nn.Conv2d(branch, stream, 3, padding=1)
        self.head = nn.Linear(stream, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 8, 8)
PIXELS = 64


def parameters(stream: int, branch: int) -> int:
    norm = 2 * stream
    up, down = branch * (stream + 1), stream * (9 * branch + 1)
    return 27 * stream + norm + up + down + 4 * (stream + 1)


def macs(stream: int, branch: int) -> int:
    return PIXELS * (27 * stream + stream * branch + 9 * branch * stream) + 4 * stream


BY_HAND: dict[Cost, Callable[[int, int], int]] = {"parameters": parameters, "macs": macs}


@pytest.mark.parametrize("cost", BY_HAND)
def test_a_channel_costs_what_a_network_without_half_of_them_saves(cost: Cost) -> None:
    net, count = Net(), BY_HAND[cost]
    assert sum(one.numel() for one in net.parameters()) == parameters(6, 5)
    groups = channel_groups(net, X).free()
    assert [(group.name, group.size) for group in groups] == [("stem", 6), ("up", 5)]
    expected = {"stem": (count(6, 5) - count(3, 5)) / 3, "up": (count(6, 5) - count(6, 3)) / 2}
    assert channel_costs(net, groups, X, cost=cost) == pytest.approx(expected, rel=1e-12)


def test_only_the_groups_that_are_asked_for() -> None:
    net = Net()
    groups = channel_groups(net, X)
    chosen = [group for group in groups if group.name == "up"]
    assert list(channel_costs(net, chosen, X, cost="parameters")) == ["up"]
    assert channel_costs(net, [], X, cost="parameters") == {}


def test_units_of_several_channels_cost_as_much_as_all_of_them() -> None:
    """Two heads of 3: q, k, v and what reads them, 8 features wide."""
    net = nn.TransformerEncoderLayer(8, 2, 7, batch_first=True)
    x = torch.randn(2, 5, 8)
    groups = {group.name: group for group in channel_groups(net, x).free()}
    found = channel_costs(net, groups.values(), x, cost="parameters")
    heads = next(name for name, group in groups.items() if "in_proj" in name and int(group.members[0].index[0, 1]) == 1)
    assert found[heads] == 3 * 4 * (8 + 1) + 4 * 8
    assert found["linear1"] == 8 + 1 + 8


def test_a_buffer_is_no_parameter() -> None:
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2))
    found = channel_costs(net, channel_groups(net, X[:, 0, 0, :4]).free(), X[:, 0, 0, :4], cost="parameters")
    assert found == {"0": 4 + 2 + 2}


def test_a_shared_weight_is_counted_once() -> None:
    shared = nn.Linear(6, 6, bias=False)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    found = channel_costs(net, channel_groups(net, x).free(), x, cost="parameters")
    assert found == {"0": ((4 * 6 + 6 * 6 + 2 * 6) - (4 * 3 + 3 * 3 + 2 * 3)) / 3}


def with_times(monkeypatch: pytest.MonkeyPatch, time: Callable[[nn.Module], float]) -> None:
    """Replace the clock by a function of the network."""

    def compare(models: dict[str, tuple[nn.Module, Any]]) -> dict[str, float]:
        return {name: time(model) for name, (model, _) in models.items()}

    monkeypatch.setattr(costs, "compare_latency", compare)


def test_latency_is_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    groups = channel_groups(net, X).free()
    with_times(monkeypatch, lambda net: 1e-3 * net.stem.out_channels + 5e-4 * net.up.out_channels**2)
    expected = {"stem": 1e-3, "up": 5e-4 * (25 - 9) / 2}
    assert channel_costs(net, groups, X, cost="latency") == pytest.approx(expected)


def test_what_drowns_in_noise_costs_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    groups = channel_groups(net, X).free()
    with_times(monkeypatch, lambda net: 1e-3 * net.stem.out_channels - 1e-4 * net.up.out_channels)
    assert channel_costs(net, groups, X, cost="latency") == pytest.approx({"stem": 1e-3, "up": 1e-6})


@pytest.mark.parametrize(
    "change",
    [0.0, 0.1],
    ids=["nothing", "all networks seem slower without channels"],
)
def test_costs_are_positive_whatever_the_clock_says(change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative cost would turn the order of the channels round."""
    net = Net()
    groups = channel_groups(net, X).free()
    with_times(monkeypatch, lambda net: 1.0 - change * (net.stem.out_channels + net.up.out_channels))
    found = channel_costs(net, groups, X, cost="latency")
    assert all(value > 0 for value in found.values())


def test_measured_latency() -> None:
    net = Net(stream=96, branch=96)
    found = channel_costs(net, channel_groups(net, X).free(), X, cost="latency")
    assert found.keys() == {"stem", "up"}
    assert all(0 < value < 1 for value in found.values())


@pytest.mark.parametrize("cost", ["parameters", "macs", "latency"])
@pytest.mark.parametrize("fail", [False, True])
def test_the_network_is_left_as_it_was(cost: Cost, fail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(Net(), nn.Linear(4, 4), nn.Dropout())
    net[1].eval()
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    net.attention = attention
    net.forward = lambda x: attention(*[net[2](net[1](net[0](x)))[:, None]] * 3)[0]  # type: ignore[method-assign]
    net[0].up.weight.grad = torch.ones_like(net[0].up.weight)
    groups = channel_groups(net, X).free()
    assert {module for group in groups for module in group.modules} >= {"0.stem", "0.down", "attention"}
    tensors = [*net.named_parameters(), *net.named_buffers()]
    before = copy.deepcopy(net.state_dict())
    identities = [(name, id(one), one.data_ptr(), one.requires_grad) for name, one in tensors]
    modes = [(name, module.training, type(module)) for name, module in net.named_modules()]
    sizes = [str(net), attention.num_heads, attention.embed_dim, attention.head_dim]
    random_state = torch.get_rng_state()
    measured = 0

    def break_down(model: nn.Module, example_inputs: Any) -> float:
        nonlocal measured
        measured += 1
        if measured == 2:  # while half of the first group is gone
            raise RuntimeError("out of memory")
        return 1.0

    if fail:
        monkeypatch.setattr(costs, "_MEASURES", {cost: break_down})
        with pytest.raises(RuntimeError, match="out of memory"):
            channel_costs(net, groups, X, cost=cost)
    else:
        channel_costs(net, groups, X, cost=cost)
    tensors = [*net.named_parameters(), *net.named_buffers()]
    assert [(name, id(one), one.data_ptr(), one.requires_grad) for name, one in tensors] == identities
    assert [(name, module.training, type(module)) for name, module in net.named_modules()] == modes
    assert [str(net), attention.num_heads, attention.embed_dim, attention.head_dim] == sizes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    assert torch.equal(net[0].up.weight.grad, torch.ones_like(net[0].up.weight))
