"""Channels through sums from zero, buffers, complex numbers, routing and single samples: cut = zeros set by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups
from lightning_compress.pruning.channels import find_channels

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SIGNAL = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check(net: nn.Module, inputs: Any, name: str, makers: list[tuple[str, int]], gone: list[int]) -> None:
    """Cut units, and compare with the dense network in which `makers`, by tensor and dimension, are zero there."""
    net = net.double().eval()
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    (group,) = (group for group in channel_groups(net, inputs) if group.name == name)
    assert group.frozen is None, group.frozen
    assert group.exact, group.note
    assert {one.tensor for one in group.members if one.produces} == {tensor for tensor, _ in makers}
    dense = copy.deepcopy(net)
    tensors = dict(dense.named_parameters()) | dict(dense.named_buffers())
    for tensor, dim in makers:
        tensors[tensor].data.index_fill_(dim, torch.tensor(gone), 0)
    parameters = sum(one.numel() for one in net.parameters())
    cut(net, inputs, remove={name: gone})
    assert sum(one.numel() for one in net.parameters()) < parameters
    got, expected = net(*arguments), dense(*arguments)
    for one, other in zip(*([some] if isinstance(some, Tensor) else some for some in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------- sums that begin at zero


def _loop(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    y: Any = 0
    for part in (a, b):
        y = y + part
    return y


def _in_place(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros_like(a)
    y += a
    y += b
    return y


SUMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b, x: sum([a, b]),
    "sum from a tensor": lambda a, b, x: sum([a, b], start=torch.tensor(0.0, dtype=a.dtype)),
    "loop": _loop,
    "in place": _in_place,
    "minus zero": lambda a, b, x: a + b - 0,
    "from zero": lambda a, b, x: 0.0 - (a + b),
    "alpha": lambda a, b, x: torch.add(torch.zeros_like(a).add_(a, alpha=2), b, alpha=0.5),
    "full": lambda a, b, x: torch.full_like(a, 0.0) + a + b,
    "expanded": lambda a, b, x: a.new_zeros(()).expand_as(a) + a + b,
    "ones times zero": lambda a, b, x: torch.ones_like(a) * 0 + a + b,
    "input times zero": lambda a, b, x: 0 * x.sum() + a + b,
    "where": lambda a, b, x: torch.where(x.mean(1, keepdim=True) > 0, a + b, 0.0),
    "filled": lambda a, b, x: (a + b).masked_fill(x.mean(1, keepdim=True) > 0, 0.0),
    "padded": lambda a, b, x: torch.cat([a + b, torch.zeros_like(a)[:, :, :2]], 2),
    "clamped": lambda a, b, x: a.clamp(0, 6) + F.hardtanh(b),
}
NOT_ZERO: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one": lambda a, b, x: a + b + 1,
    "ones": lambda a, b, x: torch.ones_like(a) + a + b,
    "clamped": lambda a, b, x: (a + b).clamp(min=1),
    "where": lambda a, b, x: torch.where(x.mean(1, keepdim=True) > 0, a + b, 0.5),
}


class Branches(nn.Module):
    def __init__(self, combine: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.combine(self.a(x), self.b(x), x)))


@pytest.mark.parametrize("way", SUMS)
def test_a_zero_that_is_added_makes_nothing(way: str) -> None:
    makers = [("a.weight", 0), ("a.bias", 0), ("b.weight", 0), ("b.bias", 0)]
    check(Branches(SUMS[way]), IMAGE, "a", makers, [1, 3, 4])


@pytest.mark.parametrize("way", NOT_ZERO)
def test_what_is_not_zero_lifts_silent_channels(way: str) -> None:
    group = channel_groups(Branches(NOT_ZERO[way]).double(), IMAGE)[0]
    assert not group.exact
    assert "reads channels that are not zero" in str(group.note)


# ---------------------------------------------------------------------- buffers beside channels


class Frozen(nn.Module):
    """A batch norm of buffers, as torchvision's detectors have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            one.reshape(1, -1, 1, 1) for one in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Buffers(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
        self.norm = Frozen(8) if kind == "frozen norm" else nn.Identity()
        self.kind = kind
        if kind in ("choice", "boolean mask"):
            self.register_buffer("factor", torch.arange(8).view(8, 1, 1) % 3 > 0)
        elif kind != "frozen norm":
            self.register_buffer("shift" if kind == "shift" else "factor", torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        if self.kind == "mask":
            y = F.relu(y) * self.factor
        if self.kind == "boolean mask":
            y = F.relu(y) * self.factor
        if self.kind == "choice":
            y = torch.where(self.factor, y, F.silu(y))
        if self.kind == "layer scale":
            y = self.factor * y
        if self.kind == "quotient":
            y = y / self.factor
        if self.kind == "shift":
            y = y + self.shift
        return self.last(F.relu(self.b(F.silu(y))))


@pytest.mark.parametrize(
    ("kind", "buffers"),
    [
        ("mask", []),
        ("layer scale", []),
        ("boolean mask", []),
        ("choice", []),
        ("quotient", []),
        ("shift", ["shift"]),
        ("frozen norm", ["norm.weight", "norm.bias"]),
    ],
)
def test_only_buffers_that_lift_a_channel_make_it(kind: str, buffers: list[str]) -> None:
    net = Buffers(kind)
    before = {name: value.clone() for name, value in net.named_buffers()}
    check(net, IMAGE, "a", [("a.weight", 0), ("a.bias", 0), *((name, 0) for name in buffers)], [0, 2, 7])
    net = Buffers(kind)
    found = find_channels(net, IMAGE.float(), ["a.weight", "b.weight"])
    assert [(one.name, one.frozen) for one in found] == [("a", None), ("b", None)]
    assert {one.tensor for one in found[0].members} == {"a.weight", "a.bias", *buffers}
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


# ---------------------------------------------------------------------- complex numbers


class Complex(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 12, 1), nn.Conv1d(12, 2, 1)
        self.kind = kind
        if kind == "mixing parameter":
            self.w = nn.Parameter(torch.randn(12, 12, 4, dtype=torch.cdouble) / 12)
        if kind == "filter":
            self.w = nn.Parameter(torch.randn(8, 9, dtype=torch.cdouble))
        if kind == "buffer":
            self.register_buffer("w", torch.randn(9, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "input":
            x = torch.view_as_real(x).transpose(1, 2)
        h = self.a(x)
        if self.kind in ("filter", "buffer"):
            h = torch.fft.irfft(torch.fft.rfft(h) * self.w, n=h.shape[-1])
        if self.kind == "spectrum":
            h = torch.fft.fft(h).abs() + torch.fft.fft(h.to(torch.cfloat), dim=2).real
        if self.kind == "rotation":
            h = torch.view_as_real(torch.view_as_complex(h.unflatten(2, (8, 2))) * 1j).flatten(2)
        h = F.relu(self.b(F.relu(h)))
        if self.kind == "mixing parameter":
            h = h + torch.fft.irfft(torch.einsum("bix,iox->box", torch.fft.rfft(h)[..., :4], self.w), n=h.shape[-1])
        y = self.last(h)
        return torch.complex(y[:, 0], y[:, 1]) if self.kind == "output" else y


@pytest.mark.parametrize("kind", ["input", "output", "mixing parameter", "filter", "buffer", "spectrum", "rotation"])
def test_complex_numbers_are_numbers(kind: str) -> None:
    x = torch.view_as_complex(SIGNAL.transpose(1, 2).contiguous()) if kind == "input" else SIGNAL
    makers = [("a.weight", 0), ("a.bias", 0)] + ([("w", 0)] if kind == "filter" else [])
    check(Complex(kind), x, "w" if kind == "filter" else "a", makers, [0, 3, 6])
    if kind == "mixing parameter":
        check(Complex(kind), x, "w", [("b.weight", 0), ("b.bias", 0), ("w", 1)], [2, 11])


# ---------------------------------------------------------------------- routing


class Experts(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.first, self.router, self.last = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        weight, chosen = self.router(x).softmax(-1).topk(1, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            here = chosen == number
            rows, rank = torch.where(here) if self.way == "where" else here.nonzero(as_tuple=True)
            part = expert(x[rows]) * weight[rows, rank, None]
            if self.way == "in place":
                y[rows] += part
            elif self.way == "accumulated":
                y = y.index_put((rows,), part, accumulate=True)
            else:
                y = y.index_add(0, rows, part)
        return self.last(x + y)


@pytest.mark.parametrize("way", ["where", "accumulated", "in place"])
def test_experts_that_are_chosen_by_the_data_may_get_thinner(way: str) -> None:
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check(Experts(way), x, "experts.1.0", [("experts.1.0.weight", 0), ("experts.1.0.bias", 0)], [0, 4, 11])
    makers = [
        f"{name}.{kind}" for name in ("first", *(f"experts.{n}.2" for n in range(2))) for kind in ("weight", "bias")
    ]
    check(Experts(way), x, "first", [(name, 0) for name in makers], [1, 2])


# ---------------------------------------------------------------------- one sample


class Streaming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Conv1d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.a(x)).mean(2).reshape(-1))


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Conv2d(1, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.a(x)).mean((1, 2)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.a, self.last = nn.GRU(3, 9, batch_first=True), nn.Linear(9, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.rnn(x, h)
        return self.last(F.relu(self.a(y))), h


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (Streaming, [(1, 3, 20)]),
        (Unbatched, [(1, 9, 9)]),
        (Recurrent, [(1, 7, 3), (1, 1, 9)]),
        (Recurrent, [(2, 7, 3), (1, 2, 9)]),
    ],
    ids=["streaming", "unbatched", "state of one", "state of two"],
)
def test_a_network_for_one_sample_is_tried_with_one(make: type[nn.Module], shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    check(make(), inputs if len(inputs) > 1 else inputs[0], "a", [("a.weight", 0), ("a.bias", 0)], [0, 5])


class StandardisedConv(nn.Conv2d):
    """As networks without norms have it: every output channel's weights have mean 0 and variance `gain` / fan-in."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.gain, self.scale = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5), (inputs * kernel**2) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        rows, gains = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        weight = F.batch_norm(rows, None, None, weight=gains, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


def test_standardised_weights_are_cut_as_if_the_thin_network_had_been_built_so() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(StandardisedConv(3, 6, 3), nn.ReLU(), StandardisedConv(6, 8, 3), nn.ReLU(), StandardisedConv(8, 2, 1))
    )
    net, x = net.double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    found = channel_groups(net, x)
    groups = {one.name: one for one in found}
    assert groups["0"].frozen is None
    assert not groups["0"].exact
    assert "needs more than one value" in (groups["2"].frozen or "")
    keep = torch.tensor([0, 3, 4])
    thin = cut(copy.deepcopy(net), x, keep={"0": keep}, groups=found, allow_inexact=True)
    built = copy.deepcopy(net)
    built[0], built[2] = StandardisedConv(3, 3, 3).double(), StandardisedConv(3, 8, 3).double()
    for name in ("weight", "bias", "gain"):
        getattr(built[0], name).data = getattr(net[0], name).data[keep]
        getattr(built[2], name).data = getattr(net[2], name).data
    built[2].weight.data, built[2].scale = net[2].weight.data[:, keep], net[2].scale
    assert torch.allclose(thin(x), built(x), rtol=1e-10, atol=1e-12)
