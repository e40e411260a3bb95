"""Networks that random weights make chaotic: sound groups are free all the same, and unsound ones stay frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.reference import relative_difference, run, zeroed
from torch import Tensor, nn

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.trial import PlanChecker

Make = Callable[..., tuple[nn.Module, Tensor]]


class Star(nn.Module):
    """A product of two branches, one of them clipped, beside a shortcut."""

    def __init__(self, width: int, *, counts: bool = False) -> None:
        super().__init__()
        self.spread = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width))
        self.one, self.other = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, 2 * width, 1)
        self.mix = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width))
        self.counts = counts

    def forward(self, x: Tensor) -> Tensor:
        y = self.spread(x)
        y = F.relu6(self.one(y)) * self.other(y)
        return x + self.mix(y * y.shape[1] if self.counts else y)


class Sine(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, counts: bool = False) -> None:
        super().__init__()
        self.layer, self.counts = nn.Linear(inputs, outputs), counts

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(30 * self.layer(x))
        return y * y.shape[-1] ** -0.5 if self.counts else y


def star_net(*, counts: bool = False) -> tuple[nn.Module, Tensor]:
    blocks = [Star(8, counts=counts and number == 5) for number in range(16)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return net, torch.randn(2, 3, 8, 8, dtype=torch.float64)


def siren(*, counts: bool = False) -> tuple[nn.Module, Tensor]:
    layers = [Sine(2, 24), *[Sine(24, 24, counts=counts and number == 3) for number in range(8)], nn.Linear(24, 3)]
    with torch.no_grad():  # as the paper draws them
        for layer in layers[1:-1]:
            nn.init.uniform_(layer.layer.weight, -(0.5**0.5) / 30, 0.5**0.5 / 30)
    return nn.Sequential(*layers), torch.rand(2, 9, 2, dtype=torch.float64)


@pytest.mark.parametrize("make", [star_net, siren])
def test_what_random_weights_make_chaotic_is_free_and_cut_right(make: Make) -> None:
    torch.manual_seed(0)
    net, inputs = make()
    net = net.double().eval()
    groups = channel_groups(net, inputs)
    assert [group.frozen for group in groups if group.frozen] == ["it is an output of the network"]
    keep = {group.name: torch.arange(0, group.size, 2) for group in groups.free()}
    assert len(keep) == (17 if make is star_net else 9)
    thin = cut(copy.deepcopy(net), keep=keep, example_inputs=inputs, groups=groups)
    assert relative_difference(run(thin, inputs), zeroed(net, groups, keep, inputs)) < 1e-9


@pytest.mark.parametrize("make", [star_net, siren])
def test_code_that_counts_its_channels_stays_frozen_among_chaos(make: Make) -> None:
    torch.manual_seed(0)
    net, inputs = make(counts=True)
    groups = channel_groups(net.eval(), inputs)
    frozen = [group.name for group in groups if "does not survive" in str(group.frozen)]
    assert frozen == ["6.one" if make is star_net else "4.layer"]
    assert len(groups.free()) == (16 if make is star_net else 8)


def test_weights_of_a_well_conditioned_network_are_not_touched() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    checker = channel_groups(net, torch.zeros(2, 6)).checker
    assert isinstance(checker, PlanChecker)
    assert checker.plan.factors == {}
