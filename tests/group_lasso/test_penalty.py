"""The penalty, its gradient and its proximal step, against autograd and brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.channels.find import channel_groups
from lightning_compress.group_lasso.penalty import (
    WeightGroups,
    add_gradient,
    penalty,
    producer_groups,
    shrink_groups,
    weight_groups,
)

LAYERS = {
    "linear": lambda: nn.Linear(4, 3, bias=False),
    "conv": lambda: nn.Conv2d(4, 6, (2, 3), bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, (2, 3), groups=2, bias=False),
    "depthwise": lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, (2, 3), bias=False),
    "transposed grouped": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False),
}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 5, 3)
        self.norm = nn.BatchNorm1d(5)
        self.hidden = nn.Linear(20, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.norm(self.conv(x))).flatten(1))))


def norms(groups: list[WeightGroups]) -> Tensor:
    return torch.cat([one.norms() for one in groups])


def touched(layer: nn.Module, output: Tensor) -> Tensor:
    """Which weights a sum of outputs depends on."""
    (gradient,) = torch.autograd.grad(output.sum(), layer.weight, retain_graph=True)
    return gradient != 0


def slices(layer: nn.Module, granularity: str) -> list[Tensor]:
    """The groups as masks over the weight, found by looking at what reaches which output."""
    kernel = layer.kernel_size if hasattr(layer, "kernel_size") else ()
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
    x = torch.rand(1, 4, *(1 for _ in kernel) if transposed else kernel) + 1
    places = [()] if not kernel else list(torch.cartesian_prod(*map(torch.arange, kernel)).view(-1, len(kernel)))
    masks = []
    if granularity == "filter":
        out = layer(x)
        masks = [touched(layer, out[:, i]) for i in range(out.shape[1])]
    for channel in range(4):
        if granularity == "channel":
            only = torch.zeros_like(x)
            only[:, channel] = x[:, channel]
            masks.append(touched(layer, layer(only)))
        if granularity == "shape":
            for place in places:
                only, at = torch.zeros_like(x), (slice(None), *(int(i) for i in place))
                if transposed:
                    only[:, channel] = 1
                    masks.append(touched(layer, layer(only)[(slice(None), *at)]))
                else:
                    only[(slice(None), channel, *at[1:])] = 1
                    masks.append(touched(layer, layer(only)))
    return masks


@pytest.mark.parametrize("granularity", ["filter", "channel", "shape"])
@pytest.mark.parametrize("kind", LAYERS)
def test_groups_are_the_weights_that_belong_to_an_output_an_input_or_a_place(kind: str, granularity: Any) -> None:
    layer = LAYERS[kind]()
    masks = slices(layer, granularity)
    expected = torch.stack([layer.weight.detach()[mask].norm() for mask in masks])
    assert torch.equal(sum(mask.int() for mask in masks), torch.ones_like(layer.weight, dtype=torch.int32))
    torch.testing.assert_close(norms(weight_groups(layer, granularity)).sort()[0], expected.sort()[0])


def test_a_unit_is_everything_that_produces_a_channel() -> None:
    net = Normed()
    nn.init.normal_(net.norm.bias)
    (conv, hidden), left_out = producer_groups(net, channel_groups(net, torch.zeros(2, 2, 6)))
    rows = [
        torch.cat([p.detach()[i].flatten() for p in (*net.conv.parameters(), *net.norm.parameters())]) for i in range(5)
    ]
    torch.testing.assert_close(conv.norms(), torch.stack([row.norm() for row in rows]))
    joined = torch.cat([net.hidden.weight, net.hidden.bias[:, None]], 1).detach()
    torch.testing.assert_close(hidden.norms(), joined.norm(dim=1))
    assert left_out == {"head": "it is an output of the network"}


def test_a_unit_may_own_several_positions_of_a_tensor() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (-1, 2)), nn.Conv1d(4, 2, 1), nn.Flatten(), nn.Linear(4, 1))
    groups, _ = producer_groups(net, channel_groups(net, torch.zeros(2, 3)))
    first = groups[0]
    pairs = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach().view(4, -1)  # a unit is two rows
    torch.testing.assert_close(first.norms(), pairs.norm(dim=1))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ({}, ["conv", "hidden"]),
        ({"target": "hidden"}, ["hidden"]),
        ({"target": "norm.bias"}, ["conv"]),
        ({"exclude": "conv"}, ["hidden"]),
        ({"target": "head"}, []),
    ],
)
def test_units_are_chosen_by_what_produces_them(patterns: dict[str, str], names: list[str]) -> None:
    net = Normed()
    groups, left_out = producer_groups(net, channel_groups(net, torch.zeros(2, 2, 6)), **patterns)
    assert [one.name for one in groups] == names
    assert bool(left_out) == ("head" in patterns.get("target", "head"))


def test_units_whose_cut_is_inexact_are_left_out_with_the_reason() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    groups, left_out = producer_groups(net, channel_groups(net, torch.zeros(2, 3)))
    assert [one.name for one in groups] == ["2"]
    assert left_out["0"].startswith("cutting it is inexact, because ")


# ---------------------------------------------------------------------- the gradient


def test_the_penalty_is_the_sum_of_norms() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    net[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    net[1].weight.data = torch.tensor([[5.0, 12.0]])
    assert penalty(weight_groups(net), 0.5).item() == pytest.approx(0.5 * (5 + 0 + 13))
    assert penalty(weight_groups(net, "channel"), 0.5).item() == pytest.approx(0.5 * (3 + 4 + 5 + 12))


@pytest.mark.parametrize("granularity", ["filter", "channel", "shape", "group"])
def test_the_added_gradient_is_that_of_the_norms_by_finite_differences(granularity: Any) -> None:
    net = Normed().double()
    if granularity == "group":
        groups, _ = producer_groups(net, channel_groups(net, torch.zeros(2, 2, 6)))
    else:
        groups = weight_groups(net, granularity)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    add_gradient(groups, 0.3)
    for parameter in net.parameters():
        flat, step = parameter.data.view(-1), 1e-6
        for i in range(0, flat.numel(), 7):
            before = float(flat[i])
            flat[i] = before + step
            above = norms(groups).sum()
            flat[i] = before - step
            slope = 0.3 * (above - norms(groups).sum()) / (2 * step)
            flat[i] = before
            assert float(parameter.grad.view(-1)[i]) == pytest.approx(1 + float(slope), abs=1e-7)


def test_a_group_of_zeros_gets_no_gradient_and_the_penalty_is_differentiable_there() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data[0] = 0
    layer.weight.grad = torch.zeros(2, 3)
    add_gradient(weight_groups(layer), 0.1)
    (by_autograd,) = torch.autograd.grad(penalty(weight_groups(layer), 0.1), layer.weight)
    assert not layer.weight.grad[0].any()
    torch.testing.assert_close(layer.weight.grad, by_autograd)


def test_gradients_go_to_what_is_stepped_by_the_given_optimizer() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.SGD([*net[0].parameters(), *net[2].parameters()], lr=0.1)
    net[0].weight.grad, net[1].weight.grad = torch.zeros(3, 3), torch.zeros(3, 3)
    add_gradient(weight_groups(net), 0.1, optimizer)
    assert net[0].weight.grad.any()
    assert not net[1].weight.grad.any()  # another optimizer's
    assert net[2].weight.grad is None  # no gradient: not stepped
    before = net[2].weight.detach().clone()
    shrink_groups(weight_groups(net), 0.1, optimizer)
    assert torch.equal(before, net[2].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_divides_by_zero(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 3, bias=False).to(dtype)
    layer.weight.data = torch.tensor([[3e4, 4e4], [0.0, 1e-7], [0.0, 0.0]], dtype=dtype)
    layer.weight.grad = torch.zeros_like(layer.weight)
    add_gradient(weight_groups(layer), 1.0)
    torch.testing.assert_close(layer.weight.grad.float(), torch.tensor([[0.6, 0.8], [0, 1], [0, 0]]), rtol=1e-2, atol=0)
    shrink_groups(weight_groups(layer), 1.0, torch.optim.SGD(layer.parameters(), lr=1.0))
    assert layer.weight.isfinite().all()
    assert not layer.weight[1:].any()


# ---------------------------------------------------------------------- the proximal step


def minimiser(w: Tensor, weight: float) -> Tensor:
    """argmin over v in the plane of 0.5 ||v - w||^2 + weight * ||v||, on ever finer grids."""
    centre, width = torch.zeros(2, dtype=torch.float64), 4.0
    line = torch.linspace(-1, 1, 41, dtype=torch.float64)
    offsets = torch.cartesian_prod(line, line)
    for _ in range(30):
        v = centre + width * offsets
        value = 0.5 * (v - w).square().sum(1) + weight * v.norm(dim=1)
        centre, width = v[value.argmin()], width / 2
    return centre


@pytest.mark.parametrize("weight", [0.01, 0.3, 2.0])
def test_shrinking_minimises_the_proximal_objective(weight: float) -> None:
    layer = nn.Linear(2, 6, bias=False).double()
    rates = (0.1, 0.5)
    for rate in rates:
        nn.init.normal_(layer.weight)
        expected = torch.stack([minimiser(w, weight) for w in layer.weight.detach()])
        layer.weight.grad = torch.zeros_like(layer.weight)
        shrink_groups(weight_groups(layer), weight / rate, torch.optim.SGD(layer.parameters(), lr=rate))
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-6)
        assert torch.equal((layer.weight == 0).all(1), expected.norm(dim=1) < 1e-6)  # zeros are exact


def test_every_parameter_shrinks_with_its_own_learning_rate() -> None:
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer, values in zip(net, ([[3.0, 4.0]], [[5.0]]), strict=True):
        layer.weight.data = torch.tensor(values)
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer = torch.optim.SGD(
        [{"params": net[0].weight, "lr": 0.1}, {"params": net[1].weight, "lr": torch.tensor(0.2)}]
    )
    shrink_groups(weight_groups(net), 10.0, optimizer)
    torch.testing.assert_close(net[0].weight.data, torch.tensor([[3.0, 4.0]]) * (1 - 0.1 * 10 / 5))
    torch.testing.assert_close(net[1].weight.data, torch.tensor([[5.0]]) * (1 - 0.2 * 10 / 5))


def test_positions_outside_of_the_units_are_not_shrunk() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    (groups,), _ = producer_groups(net, channel_groups(net, torch.zeros(1, 2)))
    before = net[2].weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    shrink_groups([groups], 100.0, torch.optim.SGD(net.parameters(), lr=1.0))
    assert not net[0].weight.any()
    assert not net[0].bias.any()
    assert torch.equal(before, net[2].weight)


# ---------------------------------------------------------------------- nothing, and bad input


def test_strength_zero_touches_nothing() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data.zero_()
    layer.weight.grad = torch.full((2, 2), -0.0)
    add_gradient(weight_groups(layer), 0.0)
    shrink_groups(weight_groups(layer), 0.0, torch.optim.SGD(layer.parameters(), lr=0.1))
    assert layer.weight.grad.signbit().all()


def test_bad_input_is_quoted() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="'filter', 'channel' or 'shape'; got 'row'"):
        weight_groups(net, "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0\.bias has shape \(2,\): a vector has no filters.*target='0\.bias'"):
        weight_groups(net, target="0.bias")
    with (
        pytest.warns(UserWarning, match="'decoder' matches no parameter"),
        pytest.raises(ValueError, match="selects no"),
    ):
        weight_groups(net, target="decoder")

    class RateLess(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    with pytest.raises(ValueError, match="needs a learning rate, and RateLess has no 'lr'"):
        shrink_groups(weight_groups(net), 1.0, RateLess(net.parameters()))
