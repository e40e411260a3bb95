"""Random networks of convolutions, norms, gates, shuffles, sums and concatenations: no cut is silently wrong.

A network is a program: a list of pieces with two numbers each. Every piece takes the last tensor and, where it joins
two, an earlier one; all of them are (batch, channels, 4, 4).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.reference import absent, randomize, relative_difference, run, zeroed
from torch import Tensor, nn

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups

TOLERANCE = 1e-9
SIDE, WIDEST = 4, 12
Program = list[tuple[str, int, int]]


class Piece(nn.Module):
    """Layers by name, and a function of the last and an earlier tensor that calls them."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        return self.body(self, x, earlier)


# A maker takes the channels of the last tensor, those of an earlier one, and two numbers. It returns a piece and the
# channels that leave it, or None where the piece does not fit.
Maker = Callable[[int, int, int, int], "tuple[Piece, int] | None"]
MAKERS: dict[str, Maker] = {}


def maker(function: Maker) -> Maker:
    MAKERS[function.__name__] = function
    return function


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n + 1) if n % d == 0] or [1]


def pick(choices: list[Any], number: int) -> Any:
    return choices[number % len(choices)]


def width(number: int) -> int:
    return 2 + number % 7


@maker
def conv(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    size = pick([1, 3], b)
    layer = nn.Conv2d(c, width(a), size, padding=size // 2, bias=b % 4 < 2)
    return Piece(lambda m, x, _: m.layer(x), layer=layer), width(a)


@maker
def activation(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    kinds = [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Softplus, nn.ReLU6]
    layer = nn.PReLU(c) if a % 11 == 10 else pick(kinds, a % 11)()
    return Piece(lambda m, x, _: m.layer(x), layer=layer), c


@maker
def batch_norm(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    return Piece(lambda m, x, _: m.layer(x), layer=nn.BatchNorm2d(c, affine=a % 4 > 0)), c


@maker
def add(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    if c == e:
        return Piece(lambda m, x, earlier: x + earlier), c
    return Piece(lambda m, x, earlier: x + m.layer(earlier), layer=nn.Conv2d(e, c, 1)), c


@maker
def concat(c: int, e: int, a: int, b: int) -> tuple[Piece, int] | None:
    if c + e > WIDEST:
        return None
    if a % 2:
        return Piece(lambda m, x, earlier: torch.cat([earlier, x], 1)), c + e
    return Piece(lambda m, x, earlier: torch.cat([x, earlier], 1)), c + e


@maker
def depthwise(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    out = 2 * c if a % 3 == 2 and 2 * c <= WIDEST else c
    layer = nn.Conv2d(c, out, 3, padding=1, groups=c, bias=b % 2 == 0)
    return Piece(lambda m, x, _: m.layer(x), layer=layer), out


@maker
def grouped(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    groups = pick(divisors(c), a)
    out = groups * pick([k for k in range(1, WIDEST + 1) if k * groups <= WIDEST], b)
    kind = nn.ConvTranspose2d if b % 2 else nn.Conv2d
    return Piece(lambda m, x, _: m.layer(x), layer=kind(c, out, 3, padding=1, groups=groups, bias=a % 2 == 0)), out


@maker
def transposed(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    return Piece(lambda m, x, _: m.layer(x), layer=nn.ConvTranspose2d(c, width(a), 3, padding=1)), width(a)


@maker
def group_norm(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    return Piece(lambda m, x, _: m.layer(x), layer=nn.GroupNorm(pick([1, *divisors(c)], a), c, affine=b % 4 > 0)), c


@maker
def layer_norm(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    layer = nn.RMSNorm(c) if a % 3 == 2 else nn.LayerNorm(c, elementwise_affine=b % 4 > 0)
    return Piece(lambda m, x, _: m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), layer=layer), c


@maker
def instance_norm(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    return Piece(lambda m, x, _: m.layer(x), layer=nn.InstanceNorm2d(c, affine=a % 2 == 0)), c


@maker
def gate(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    squash = pick([torch.sigmoid, F.hardsigmoid, torch.tanh, F.softplus], b)
    return Piece(lambda m, x, earlier: x * squash(m.layer(earlier)), layer=nn.Conv2d(e, c, 1)), c


@maker
def squeeze_excite(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    layers = nn.Sequential(nn.Linear(c, width(a)), nn.ReLU(), nn.Linear(width(a), c))
    return Piece(lambda m, x, _: x * torch.sigmoid(m.layers(x.mean((2, 3))))[:, :, None, None], layers=layers), c


@maker
def film(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    def body(m: Any, x: Tensor, earlier: Tensor) -> Tensor:
        pooled = earlier.mean((2, 3))
        return x * (1 + m.scale(pooled)[..., None, None]) + m.shift(pooled)[..., None, None]

    return Piece(body, scale=nn.Linear(e, c), shift=nn.Linear(e, c)), c


@maker
def pool(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    kinds = [F.max_pool2d, F.avg_pool2d]
    return Piece(lambda m, x, _: pick(kinds, a)(x, 3, 1, 1)), c


@maker
def chunk(c: int, e: int, a: int, b: int) -> tuple[Piece, int] | None:
    if c % 2:
        return None
    joins: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: x * torch.sigmoid(y),
        lambda x, y: x * y,
        lambda x, y: x + y,
        lambda x, y: F.glu(torch.cat([x, y], 1), 1),
        lambda x, y: torch.cat([y, x], 1),
        lambda x, y: torch.cat([x, F.relu(y)], 1),
    ]
    return Piece(lambda m, x, _: pick(joins, a)(*x.chunk(2, 1))), c if a % len(joins) > 3 else c // 2


@maker
def shuffle(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    groups = pick(divisors(c), a)
    inferred = b % 2 == 0

    def body(m: Any, x: Tensor, _: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        x = x.view(batch, groups, -1 if inferred else channels // groups, SIDE, SIDE)
        return x.transpose(1, 2).reshape(batch, channels, SIDE, SIDE)

    return Piece(body), c


@maker
def fold(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    """Channels in groups, of which one dimension is summed, averaged, or its largest entry taken."""
    groups = pick(divisors(c), a)
    reduce = pick([Tensor.sum, Tensor.mean, Tensor.amax], b)
    if b % 2:
        return Piece(lambda m, x, _: reduce(x.unflatten(1, (groups, -1)), 1)), c // groups
    return Piece(lambda m, x, _: reduce(x.unflatten(1, (-1, groups)), 2)), c // groups


@maker
def parameters(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    scale, shift = nn.Parameter(torch.ones(c, 1, 1)), nn.Parameter(torch.ones(1, c, 1 if a % 2 else SIDE, SIDE))
    kinds: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
        lambda m, x, _: x * m.scale,
        lambda m, x, _: x + m.shift,
        lambda m, x, _: x * m.scale + m.shift,
        lambda m, x, earlier: x + m.constant,
    ]
    return Piece(pick(kinds, b), scale=scale, shift=shift, constant=nn.Parameter(torch.ones(()))), c


@maker
def over_channels(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    kinds: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
        lambda m, x, _: torch.softmax(x, 1),
        lambda m, x, _: x - x.mean(1, keepdim=True),
        lambda m, x, _: x + x.sum(1, keepdim=True),
        lambda m, x, _: x * torch.softmax(x.mean((2, 3), keepdim=True), 1),
        lambda m, x, _: x.flip(1),
        lambda m, x, _: x.roll(1, 1),
        lambda m, x, _: x / (1 + x.abs().sum(1, keepdim=True)),
    ]
    return Piece(pick(kinds, a)), c


@maker
def literal(c: int, e: int, a: int, b: int) -> tuple[Piece, int] | None:
    """Slices at places that the code names."""
    at = 1 + a % (c - 1) if c > 1 else 0
    if not at:
        return None
    kinds: list[tuple[Callable[[Any, Tensor, Tensor], Tensor], int]] = [
        (lambda m, x, _: x[:, at:], c - at),
        (lambda m, x, _: x[:, :at], at),
        (lambda m, x, _: torch.cat([x[:, at:], x[:, :at]], 1), c),
        (lambda m, x, _: torch.cat(x.split([at, c - at], 1)[::-1], 1), c),
        (lambda m, x, _: x[:, ::2], (c + 1) // 2),
        (lambda m, x, _: torch.cat([F.relu(x[:, :at]), x[:, at:]], 1), c),
        (lambda m, x, _: x + x[:, at : at + 1], c),
    ]
    body, out = pick(kinds, b)
    return Piece(body), out


@maker
def pixels(c: int, e: int, a: int, b: int) -> tuple[Piece, int] | None:
    if a % 2 and c * 4 <= WIDEST:
        return Piece(lambda m, x, _: F.interpolate(F.pixel_unshuffle(x, 2), scale_factor=2)), 4 * c
    if c % 4:
        return None
    return Piece(lambda m, x, _: F.avg_pool2d(F.pixel_shuffle(x, 2), 2)), c // 4


@maker
def linear(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    layer = nn.Linear(c, width(a))
    if b % 2:
        return Piece(lambda m, x, _: m.layer(x.flatten(2).transpose(1, 2)).mT.unflatten(2, (4, 4)), layer=layer), width(
            a
        )
    return Piece(lambda m, x, _: m.layer(x.permute(0, 2, 3, 1)).movedim(-1, 1), layer=layer), width(a)


@maker
def twice(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    """One layer, called twice; or a weight and its transpose."""
    if a % 2:
        return Piece(lambda m, x, _: m.layer(F.relu(m.layer(x))), layer=nn.Conv2d(c, c, 3, padding=1)), c
    weight = nn.Parameter(torch.ones(width(b), c, 1, 1))
    return Piece(lambda m, x, _: F.conv2d(F.relu(F.conv2d(x, m.weight)), m.weight.transpose(0, 1)), weight=weight), c


@maker
def attention(c: int, e: int, a: int, b: int) -> tuple[Piece, int]:
    heads, dim = 2 + a % 2, 2 + a % 3
    sizes = (-1, dim) if b % 2 else (heads, -1)
    scale: float | None = 0.5 if b % 3 else None

    def body(m: Any, x: Tensor, earlier: Tensor) -> Tensor:
        x, y = (t.flatten(2).transpose(1, 2) for t in (x, earlier))
        q, k, v = (layer(t).unflatten(2, sizes).transpose(1, 2) for layer, t in ((m.q, x), (m.k, y), (m.v, y)))
        if b % 4 < 2:
            z = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            z = torch.softmax(q @ k.mT * (scale or q.shape[-1] ** -0.5), -1) @ v
        return m.mix(z.transpose(1, 2).flatten(2)).mT.unflatten(2, (SIDE, SIDE))

    q, k, v = (nn.Linear(channels, heads * dim) for channels in (c, e, e))
    return Piece(body, q=q, k=k, v=v, mix=nn.Linear(heads * dim, c)), c


ENDS: list[Callable[[int], Piece]] = [
    lambda c: Piece(lambda m, x, _: m.out(x.mean((2, 3))), out=nn.Linear(c, 3)),
    lambda c: Piece(lambda m, x, _: m.out(x.flatten(1)), out=nn.Linear(SIDE * SIDE * c, 3)),
    lambda c: Piece(
        lambda m, x, _: m.out(F.relu(m.hidden(F.adaptive_max_pool2d(x, 2).flatten(1)))),
        hidden=nn.Linear(4 * c, 5),
        out=nn.Linear(5, 3),
    ),
    lambda c: Piece(lambda m, x, _: m.out(x), out=nn.Conv2d(c, 2, 3, padding=1)),
    lambda c: Piece(lambda m, x, earlier: x),
]


class RandomNetwork(nn.Module):
    """The pieces of a program after a first convolution; every piece may reach back to any earlier tensor."""

    def __init__(self, program: Program, end: int) -> None:
        super().__init__()
        first = nn.Conv2d(3, 6, 3, padding=1)
        self.pieces, self.reach, channels = nn.ModuleList([Piece(lambda m, x, _: m.layer(x), layer=first)]), [0], [3, 6]
        for name, a, b in program:
            back = (a + b) % len(channels)
            made = MAKERS[name](channels[-1], channels[back], a, b)
            if made is not None:
                self.pieces.append(made[0])
                self.reach.append(back)
                channels.append(made[1])
        self.pieces.append(pick(ENDS, end)(channels[-1]))
        self.reach.append(0)

    def forward(self, x: Tensor) -> Tensor:
        past = [x]
        for piece, back in zip(self.pieces, self.reach, strict=True):
            past.append(piece(past[-1], past[back]))
        return past[-1]


def check(program: Program, end: int, seed: int, exact_only: bool) -> tuple[int, int]:
    """Cut a random part of random groups and compare with the oracles; how many groups were free, and there at all."""
    torch.manual_seed(seed)
    model = randomize(RandomNetwork(program, end), seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)
    groups = channel_groups(copy.deepcopy(model), inputs)
    free = [group for group in groups if group.frozen is None]
    keep = {}
    for group in free:
        if (group.exact or not exact_only) and float(torch.rand((), generator=generator)) < 0.7:
            how_many = int(torch.randint(1, max(2, group.size), (), generator=generator))
            keep[group.name] = torch.randperm(group.size, generator=generator)[:how_many].sort().values
    thin = cut(copy.deepcopy(model), inputs, keep=keep, allow_inexact=not exact_only, groups=groups)
    # More than the example: what holds for its values only would show.
    others = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)
    output = run(thin, others)
    assert relative_difference(output, absent(model, groups, keep, others)) <= TOLERANCE
    if exact_only:
        assert relative_difference(output, zeroed(model, groups, keep, others, norms=False)) <= TOLERANCE
    return len(free), len(groups)


NUMBERS = st.integers(0, 11)
PROGRAMS = st.lists(st.tuples(st.sampled_from(list(MAKERS)), NUMBERS, NUMBERS), min_size=1, max_size=7)


def check_many(number: int) -> None:
    """The property, and that the planner does not owe it to freezing everything."""
    counts: list[tuple[int, int]] = []

    @settings(max_examples=number, derandomize=number <= 300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(PROGRAMS, st.integers(0, len(ENDS) - 1), st.integers(0, 2**16), st.booleans())
    def property_holds(program: Program, end: int, seed: int, exact_only: bool) -> None:
        counts.append(check(program, end, seed, exact_only))

    property_holds()
    assert sum(free for free, _ in counts) >= 0.4 * sum(every for _, every in counts)


def test_no_cut_of_a_random_network_is_silently_wrong() -> None:
    check_many(300)


@pytest.mark.slow
def test_no_cut_of_ten_thousand_random_networks_is_silently_wrong() -> None:
    check_many(10_000)


@pytest.mark.parametrize("name", MAKERS)
def test_every_piece_alone(name: str) -> None:
    """Each kind of piece between two convolutions, all its variants in the long run."""
    for number in range(3):
        check([("conv", 4, 1), (name, number, number + 1), ("conv", 3, 1)], end=0, seed=number, exact_only=False)
