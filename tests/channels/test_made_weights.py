"""Weights that a layer makes from others, and numbers in modules that only look as if they counted channels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT = "parametrizations.weight.original"
MADE: dict[str, tuple[Callable[[nn.Module], nn.Module], list[tuple[str, int]]]] = {  # and what makes channels of `b`
    "weight norm of rows": (weight_norm, [(f"b.{WEIGHT}0", 0), (f"c.{WEIGHT}1", 1)]),
    "weight norm of columns": (lambda layer: weight_norm(layer, dim=1), [(f"b.{WEIGHT}1", 0), (f"c.{WEIGHT}0", 1)]),
    "weight norm of all": (lambda layer: weight_norm(layer, dim=None), [(f"b.{WEIGHT}1", 0), (f"c.{WEIGHT}1", 1)]),
    "spectral norm": (spectral_norm, [(f"b.{WEIGHT}", 0), (f"c.{WEIGHT}", 1)]),
}


class Three(nn.Module):
    def __init__(self, made: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = made(nn.Linear(5, 8)), made(nn.Linear(8, 9, bias=False)), made(nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.b(F.silu(self.a(x)))))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("what", MADE)
def test_channels_of_made_weights_are_cut_as_if_they_were_zero(what: str, training: bool) -> None:
    made, makers = MADE[what]
    net = Three(made).double().train(training)
    dense, buffers = copy.deepcopy(net), {name: one.clone() for name, one in net.named_buffers()}
    with torch.no_grad():
        for tensor, dim in makers:
            dense.get_parameter(tensor).index_fill_(dim, torch.tensor([1, 4]), 0)
    name = next(group.name for group in channel_groups(net, X) if group.name.startswith("b."))
    cut(net, X, remove={name: [1, 4]})
    assert (net.b.in_features, net.b.out_features, net.c.in_features, net.c.out_features) == (8, 7, 7, 3)
    for name, buffer in net.named_buffers():  # reading a weight in training mode would have moved them
        here = torch.tensor([0, 2, 3, 5, 6, 7, 8]) if len(buffer) == 7 else slice(None)
        assert torch.equal(buffer, buffers[name][here])
    torch.testing.assert_close(net(X), dense(X))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


@pytest.mark.parametrize("kernel", [1, 2])
def test_a_deviation_of_one_value_freezes_what_it_would_be_of(kernel: int) -> None:
    net = nn.Sequential(
        Standardised(3, 6, kernel), nn.ReLU(), Standardised(6, 5, kernel), nn.ReLU(), nn.Conv2d(5, 2, 1)
    )
    x = torch.randn(2, 3, 6, 6)
    first = channel_groups(net, x)[0]
    if kernel == 1:
        assert first.frozen == "std in '2' needs more than one value, and one would be left"
    else:
        cut(net, x, keep={first.name: [3]}, allow_inexact=True)
        assert net(x).isfinite().all()


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = *(nn.Linear(6, 8) for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1
        return self.out(torch.einsum("nld,ndm->nlm", q, torch.einsum("nsd,nsm->ndm", k, self.v(x))))


def test_channels_that_an_einsum_reads_without_being_zero_are_cut_as_if_it_did_not_read_them() -> None:
    net, x = LinearAttention().double(), torch.randn(2, 7, 6, dtype=torch.float64)
    group = channel_groups(net, x)[0]
    assert group.frozen is None
    assert group.note == "einsum reads channels that are not zero when what makes them is"
    thin = LinearAttention().double()
    thin.load_state_dict(net.state_dict())
    stays = torch.tensor([0, 2, 5])
    for layer in (thin.q, thin.k):
        layer.weight, layer.bias = nn.Parameter(layer.weight[stays]), nn.Parameter(layer.bias[stays])
    cut(net, x, keep={group.name: stays}, allow_inexact=True)
    torch.testing.assert_close(net(x), thin(x))


class Misnamed(nn.Module):
    """Numbers of the network's own that have the names of numbers that count channels."""

    num_features, normalized_shape, groups, num_groups = 64, (12, 7), 5, 9

    def __init__(self) -> None:
        super().__init__()
        for name in ("num_features", "normalized_shape", "groups", "num_groups"):
            setattr(self, name, getattr(type(self), name))
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)
        self.depthwise = nn.Parameter(torch.randn(12, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.first(x), None, None, training=True)
        x = F.conv2d(x, self.depthwise, groups=x.shape[1])
        x = F.group_norm(x, x.shape[1])
        return self.last(F.layer_norm(x, x.shape[2:]))


def test_a_number_that_counts_something_else_stays() -> None:
    net = Misnamed()
    cut(net, torch.randn(2, 3, 6, 6), remove={"depthwise": [0, 1, 2]}, allow_inexact=True)
    assert (net.num_features, net.normalized_shape, net.groups, net.num_groups) == (64, (12, 7), 5, 9)
