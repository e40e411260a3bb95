"""Tiny networks of every architecture, each with the channel groups that were derived by hand.

Sizes within a network differ wherever the architecture allows it, so that no two dimensions can be confused. What is
counted: the free groups of more than one unit. Network inputs and outputs are frozen. A dimension that is a product
(the groups of a grouped convolution or of a group norm, heads and head dimensions) has one group per factor. A size
that the code takes from a literal freezes the dimension; one that it takes from a module's attribute can be updated by
a cut, unless the attribute stands for several sizes at once (the head dimension of q and k, and that of v).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One network: how to make it, what to feed it, and what a planner must find in it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]  # a tensor, a tuple of positional or a dict of keyword arguments; a batch of two
    free_exact: int
    free_inexact: int = 0
    min_free_share: float = 0.9  # of the parameters, those that lie in a slice of a free group
    emits_at_zero: bool = False  # a channel with zeroed producers is not zero further on: f(0) is not 0
    frozen_by: str = ""  # what the reason of one frozen group must name
    debatable: str = ""


class Net(nn.Module):
    """Layers by name, and a function that calls them."""

    def __init__(self, body: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def drawn(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def tokens(vocabulary: int, length: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(1, vocabulary, (2, length), generator=torch.Generator().manual_seed(7))


def head(width: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


ZOO: dict[str, Specimen] = {}

# --- linear layers and convolutions -----------------------------------------------------------------------------------

ZOO["mlp"] = Specimen(
    make=lambda: nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 7), nn.GELU(), nn.Linear(7, 3)),
    inputs=drawn(2, 5),
    free_exact=2,  # 11, 7
    min_free_share=0.98,  # all but the last bias: 171 of 174
)
ZOO["cosine"] = Specimen(  # zeros add nothing to a length
    make=lambda: Net(lambda m, x: m.fc2(F.normalize(m.fc1(x).relu(), dim=1)), fc1=nn.Linear(6, 9), fc2=nn.Linear(9, 4)),
    inputs=drawn(2, 6),
    free_exact=1,
    min_free_share=0.96,  # all but the last bias: 4 of 103
)
ZOO["conv1d"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Conv1d(2, 5, 3, padding=1), nn.BatchNorm1d(5), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(5, 7, 3, dilation=2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(7, 3)),
    ),
    inputs=drawn(2, 2, 12),
    free_exact=2,  # 5, 7
    min_free_share=0.98,  # all but the last bias: 188 of 191
)
ZOO["conv2d"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.PReLU(5), nn.AvgPool2d(2)),
        *(nn.Conv2d(5, 7, 3, padding=1, padding_mode="reflect"), nn.LeakyReLU(), nn.Dropout2d(0.1), head(7, 3)),
    ),
    inputs=drawn(2, 2, 6, 6),
    free_exact=2,  # 5, 7
    min_free_share=0.99,  # all but the last bias
)
ZOO["conv3d"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Conv3d(2, 5, 3, padding=1), nn.BatchNorm3d(5), nn.SiLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(5, 7, (1, 2, 2)), nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(7, 3)),
    ),
    inputs=drawn(2, 2, 4, 4, 4),
    free_exact=2,  # 5, 7
    min_free_share=0.99,  # all but the last bias
)
ZOO["transposed"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(5, 7, 2, stride=2), nn.BatchNorm2d(7), nn.ReLU(), nn.ConvTranspose2d(7, 2, 3, padding=1)),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=2,  # 5, 7
    min_free_share=0.99,  # all but the last bias
)
ZOO["generator"] = Specimen(  # one channel of the view is a block of four rows of the linear layer
    make=lambda: Net(
        lambda m, x: m.deconv(F.relu(m.first(x).view(x.shape[0], -1, 2, 2))),
        first=nn.Linear(4, 6 * 2 * 2),
        deconv=nn.Sequential(
            nn.ConvTranspose2d(6, 5, 2, stride=2), nn.BatchNorm2d(5), nn.ReLU(), nn.ConvTranspose2d(5, 2, 1), nn.Tanh()
        ),
    ),
    inputs=drawn(2, 4),
    free_exact=2,  # 6 blocks of 4, 5
    min_free_share=0.99,  # all but the last bias: 2 of 267
)
ZOO["grouped"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.ConvTranspose2d(12, 10, 2, stride=2, groups=2), nn.ReLU(), nn.Conv2d(10, 3, 1)),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=4,  # within the groups 4, 6 and 5 (8 = 2 x 4, 12 = 2 x 6, 10 = 2 x 5), and the 2 groups themselves
    min_free_share=0.99,  # all but the last bias
    debatable="whole convolution groups (size 2) may not be offered: then 3",
)
ZOO["resnet"] = Specimen(
    make=lambda: Net(
        _resnet,
        stem=nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        a=nn.Sequential(nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True)),
        b=nn.Sequential(nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
        c=nn.Sequential(nn.Conv2d(6, 9, 3, 2, padding=1, bias=False), nn.BatchNorm2d(9), nn.ReLU(inplace=True)),
        d=nn.Sequential(nn.Conv2d(9, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)),
        shortcut=nn.Sequential(nn.Conv2d(6, 10, 1, 2, bias=False), nn.BatchNorm2d(10)),
        fc=nn.Linear(10 * 2 * 2, 4),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=4,  # the streams 6 and 10 (four columns of fc each), the blocks' 5 and 9
    min_free_share=0.99,  # all but the last bias
)


def _resnet(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = F.relu(m.b(m.a(x)) + x)
    y = m.d(m.c(x))
    y += m.shortcut(x)
    return m.fc(torch.flatten(F.relu(y), 1))


ZOO["densenet"] = Specimen(
    make=lambda: Net(
        _densenet,
        stem=nn.Conv2d(3, 5, 3, padding=1),
        one=nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)),
        two=nn.Sequential(nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 3, 3, padding=1)),
        out=nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 7, 1), nn.AvgPool2d(2), head(7, 3)),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=4,  # stem 5, growth 4 and 3 (cut inside three concatenations), transition 7
    min_free_share=0.99,  # all but the last bias
)


def _densenet(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = torch.cat([x, m.one(x)], 1)
    return m.out(torch.cat([x, m.two(x)], 1))


ZOO["mobilenet"] = Specimen(
    make=lambda: Net(
        _mobilenet,
        stem=nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
        expand=nn.Sequential(nn.Conv2d(6, 10, 1, bias=False), nn.BatchNorm2d(10), nn.Hardswish()),
        depthwise=nn.Sequential(
            nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False), nn.BatchNorm2d(10), nn.Hardswish()
        ),
        squeeze=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(10, 4, 1), nn.ReLU(), nn.Conv2d(4, 10, 1)),
        project=nn.Sequential(nn.Conv2d(10, 6, 1, bias=False), nn.BatchNorm2d(6)),
        out=nn.Sequential(nn.Conv2d(6, 11, 1, bias=False), nn.BatchNorm2d(11), nn.ReLU6(), head(11, 3)),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=4,  # stream 6, expanded 10 (with the depthwise layer and the gate), squeezed 4, head 11
    min_free_share=0.99,  # all but the last bias
)


def _mobilenet(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    y = m.depthwise(m.expand(x))
    return m.out(x + m.project(y * torch.sigmoid(m.squeeze(y))))


def shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


ZOO["shufflenet v1"] = Specimen(
    make=lambda: Net(
        lambda m, x: m.out(F.relu(m.stem(x) + m.last(m.depthwise(shuffle(m.first(m.stem(x)), 2))))),
        stem=nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU()),
        first=nn.Sequential(nn.Conv2d(12, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        depthwise=nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)),
        last=nn.Sequential(nn.Conv2d(8, 12, 1, groups=2, bias=False), nn.BatchNorm2d(12)),
        out=head(12, 3),
    ),
    inputs=drawn(2, 3, 4, 4),
    # The stream, 12 = 2 x 6: the 6 within the groups. The inner 8 = (2 groups of `first`) x (2 groups of `last`) x 2:
    # the last 2. The groups of `first` are a literal of the shuffle; those of `last` are, by the sum, those of `first`.
    free_exact=2,
    min_free_share=0.99,  # all but the last bias
)
ZOO["shufflenet v2"] = Specimen(
    make=lambda: Net(
        _shufflenet_v2,
        stem=nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        one=_shuffle_branch(6, 5),
        two=_shuffle_branch(6, 7),
        out=head(12, 4),
    ),
    inputs=drawn(2, 3, 4, 4),
    # Within the branches 5 and 7. The stream: halves stay equal only if c and c + 6 leave together (both halves, both
    # branches: 6 classes); after the shuffle position 2 j + s lies in half j // 3, which ties j to j + 3: 3 classes.
    free_exact=3,
    min_free_share=0.99,  # all but the last bias
)


def _shuffle_branch(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()),
        *(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)),
        *(nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
    )


def _shufflenet_v2(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    for branch in (m.one, m.two):
        left, right = x.chunk(2, 1)
        x = shuffle(torch.cat([left, branch(right)], 1), 2)
    return m.out(x)


ZOO["inception"] = Specimen(
    make=lambda: Net(
        lambda m, x: m.out(F.relu(torch.cat([branch(F.relu(m.stem(x))) for branch in m.branches], 1))),
        stem=nn.Conv2d(3, 5, 3, padding=1),
        branches=nn.ModuleList(
            [
                nn.Conv2d(5, 4, 1),
                nn.Sequential(nn.Conv2d(5, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 3, padding=1)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(5, 2, 1)),
            ]
        ),
        out=head(12, 3),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=5,  # 5, 4, 3, 6, 2
    min_free_share=0.99,  # all but the last bias
)
ZOO["unet"] = Specimen(
    make=lambda: Net(
        _unet,
        one=nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU()),
        two=nn.Sequential(nn.Conv2d(5, 9, 3, padding=1), nn.ReLU()),
        mid=nn.Sequential(nn.Conv2d(9, 11, 3, padding=1), nn.ReLU()),
        up_two=nn.ConvTranspose2d(11, 7, 2, stride=2),
        dec_two=nn.Sequential(nn.Conv2d(16, 6, 3, padding=1), nn.ReLU()),
        up_one=nn.ConvTranspose2d(6, 4, 2, stride=2),
        dec_one=nn.Sequential(nn.Conv2d(9, 3, 3, padding=1), nn.ReLU()),
        out=nn.Conv2d(3, 2, 1),
    ),
    inputs=drawn(2, 2, 4, 4),
    free_exact=7,  # 5, 9, 11, 7, 6, 4, 3
    min_free_share=0.99,  # all but the last bias
)


def _unet(m: Any, x: Tensor) -> Tensor:
    one = m.one(x)
    two = m.two(F.max_pool2d(one, 2))
    x = m.dec_two(torch.cat([two, m.up_two(m.mid(F.max_pool2d(two, 2)))], 1))
    return m.out(m.dec_one(torch.cat([one, m.up_one(x)], 1)))


ZOO["pixel shuffle"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 12, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()),
        *(nn.Conv2d(3, 2, 3, padding=1),),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=2,  # 5, and 3 blocks of 4
    min_free_share=0.99,  # all but the last bias
)
ZOO["interpolate and pad"] = Specimen(
    make=lambda: Net(
        lambda m, x: m.three(
            F.pad(
                F.relu(m.two(F.pad(F.interpolate(F.relu(m.one(x)), scale_factor=2.0), (1, 1, 1, 1), "reflect"))),
                [1] * 4,
            )
        ),
        one=nn.Conv2d(3, 5, 3, padding=1),
        two=nn.Conv2d(5, 7, 3),
        three=nn.Conv2d(7, 2, 3),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=2,  # 5, 7
    min_free_share=0.99,  # all but the last bias
)
ZOO["bilinear"] = Specimen(
    make=lambda: Net(
        lambda m, x: m.two(F.interpolate(F.relu(m.one(x)), size=(7, 7), mode="bilinear", align_corners=False)),
        one=nn.Conv2d(3, 5, 3, padding=1),
        two=nn.Conv2d(5, 2, 3),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=1,  # 5
    min_free_share=0.99,  # all but the last bias
)

# --- norms ------------------------------------------------------------------------------------------------------------

ZOO["group norm"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU()),
        *(nn.Conv2d(12, 10, 3, padding=1), nn.GroupNorm(2, 10), nn.ReLU(), head(10, 5)),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=2,  # whole norm groups: 3 of 4 channels, 2 of 5; no average changes
    free_inexact=2,  # within the norm groups: 4 of 3 channels, 5 of 2
    min_free_share=0.99,  # all but the last bias
    debatable="whole norm groups (3 and 2, exact) may not be offered: then 0 exact",
)
ZOO["instance norm"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Conv2d(3, 7, 3, padding=1), nn.InstanceNorm2d(7, affine=True), nn.ReLU()),
        *(nn.Conv2d(7, 5, 3, padding=1), nn.InstanceNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=2,  # 7, 5: every channel has its own average
    min_free_share=0.99,  # all but the last bias
)
ZOO["layer norm"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Linear(5, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3)),
    ),
    inputs=drawn(2, 5),
    free_exact=0,
    free_inexact=2,  # 9, 7
    min_free_share=0.98,  # all but the last bias
)
ZOO["layer norm of images"] = Specimen(
    make=lambda: nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.LayerNorm([7, 4, 4]), nn.ReLU(), nn.Conv2d(7, 2, 3)),
    inputs=drawn(2, 3, 4, 4),
    free_exact=0,
    free_inexact=1,  # 7
    min_free_share=0.99,  # all but the last bias
)


class RMSNorm(nn.Module):
    """As Llama writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


ZOO["rms norm"] = Specimen(
    make=lambda: nn.Sequential(
        *(nn.Linear(5, 9), nn.RMSNorm(9), nn.ReLU(), nn.Linear(9, 7), RMSNorm(7), nn.ReLU(), nn.Linear(7, 3)),
    ),
    inputs=drawn(2, 5),
    free_exact=0,
    free_inexact=2,  # 9, 7
    min_free_share=0.98,  # all but the last bias
)
ZOO["batch norm without scale"] = Specimen(
    make=lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5, affine=False), nn.ReLU(), nn.Conv2d(5, 2, 1)
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=0,
    free_inexact=1,  # 5: a zeroed channel leaves the norm as -mean / deviation
    min_free_share=0.98,  # all but the last bias
    emits_at_zero=True,
    debatable="may be frozen instead of inexact",
)
ZOO["f(0) is not 0"] = Specimen(
    make=lambda: nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 6), nn.Softplus(), nn.Linear(6, 4)),
    inputs=drawn(2, 5),
    free_exact=0,
    free_inexact=2,  # 7, 6
    min_free_share=0.96,  # all but the last bias
    emits_at_zero=True,
)
ZOO["softmax over channels"] = Specimen(
    make=lambda: nn.Sequential(nn.Linear(5, 7), nn.Softmax(-1), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)),
    inputs=drawn(2, 5),
    free_exact=1,  # 6
    free_inexact=1,  # 7
    min_free_share=0.96,  # all but the last bias
    emits_at_zero=True,
)

# --- bare parameters, gates, code of all kinds ------------------------------------------------------------------------


def bare(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


ZOO["bare parameters"] = Specimen(
    make=lambda: Net(
        _bare_parameters,
        patches=nn.Linear(6, 10),
        token=bare(1, 1, 10),
        position=bare(1, 5, 10),
        up=nn.Linear(10, 13),
        down=nn.Linear(13, 10),
        scale=bare(10),
        out=nn.Linear(10, 3),
    ),
    inputs=drawn(2, 4, 6),
    free_exact=2,  # stream 10, hidden 13
    min_free_share=0.99,  # all but the last bias
)


def _bare_parameters(m: Any, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), m.patches(x)], 1) + m.position
    x = x + m.scale * m.down(F.relu(m.up(x)))
    return m.out(x[:, 0])


ZOO["glu"] = Specimen(
    make=lambda: Net(
        _glu, one=nn.Linear(5, 14), two=nn.Linear(7, 12), gate=nn.Linear(6, 9), up=nn.Linear(6, 9), out=nn.Linear(9, 3)
    ),
    inputs=drawn(2, 5),
    free_exact=3,  # 7 (pairs of rows), 6 (pairs), 9
    min_free_share=0.99,  # all but the last bias
)


def _glu(m: Any, x: Tensor) -> Tensor:
    a, b = m.one(x).chunk(2, -1)
    x = F.glu(m.two(a * torch.sigmoid(b)), -1)
    return m.out(F.silu(m.gate(x)) * m.up(x))


class Film(nn.Module):
    """Features scaled and shifted by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.scale, self.shift = nn.Linear(5, 7), nn.Linear(4, 7), nn.Linear(4, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.out(F.relu(self.features(x) * (1 + self.scale(condition)) + self.shift(condition)))


ZOO["film"] = Specimen(
    make=Film,
    inputs=lambda: (drawn(2, 5)(), drawn(2, 4)()),
    free_exact=1,  # 7: 0 * (1 + 0) + 0 = 0
    min_free_share=0.97,  # all but the last bias: 133 of 136
    debatable="1 + scale is not zero at zero, but the product with the features is; inexact would be over-careful",
)


class TwoInputs(nn.Module):
    """Two keyword inputs, added; a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.mid = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 8)
        self.logits, self.aux = nn.Linear(8, 3), nn.Linear(6, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        x = F.relu(self.left(left) + self.right(right))
        return {"logits": self.logits(F.relu(self.mid(x))), "aux": (self.aux(x),)}


ZOO["two inputs"] = Specimen(
    make=TwoInputs,
    inputs=lambda: {"left": drawn(2, 4)(), "right": drawn(2, 5)()},
    free_exact=2,  # 6, 8
    min_free_share=0.96,  # all but the last biases: 156 of 161
)
ZOO["shared layer"] = Specimen(
    make=lambda: Net(
        lambda m, x: m.out(F.relu(m.shared(F.relu(m.shared(F.relu(m.first(x))))))),
        first=nn.Linear(5, 6),
        shared=nn.Linear(6, 6),
        out=nn.Linear(6, 3),
    ),
    inputs=drawn(2, 5),
    free_exact=1,  # 6, rows and columns of the shared layer
    min_free_share=0.96,  # all but the last bias
    debatable="a module that is called twice may be refused by name instead",
)
ZOO["tied autoencoder"] = Specimen(
    make=lambda: Net(
        lambda m, x: F.linear(F.relu(F.linear(x, m.weight, m.bias)), m.weight.t(), m.last_bias),
        weight=bare(7, 5),
        bias=bare(7),
        last_bias=bare(5),
    ),
    inputs=drawn(2, 5),
    free_exact=1,  # 7
    min_free_share=0.89,  # all but the last bias: 42 of 47
)
ZOO["literal view"] = Specimen(
    make=lambda: Net(
        lambda m, x: m.fc(F.relu(m.two(F.relu(m.one(x)))).view(-1, 96)),
        one=nn.Conv2d(3, 5, 3, padding=1),
        two=nn.Conv2d(5, 6, 3, padding=1),
        fc=nn.Linear(96, 3),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=1,  # 5; the 6 of the second layer are fixed by the 96 in the code
    min_free_share=0.56,  # one: 140, two: weight 270, of 140 + 276 + 291
)
ZOO["literal slice"] = Specimen(
    make=lambda: Net(
        _literal_slice,
        first=nn.Conv2d(3, 8, 1),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(5, 4, 1),
        out=nn.Conv2d(4, 2, 1),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=2,  # 5 (the rest of the first layer), 4; the first three channels are fixed by the 3 in the code
    min_free_share=0.82,  # without the first 3 channels' 3 x (3 + 1) and the last bias: 68 of 82
    debatable="the rest (5) may be frozen together with the first three channels",
)


def _literal_slice(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.first(x))
    return m.out(F.relu(m.a(x[:, :3]) + m.b(x[:, 3:])))


ZOO["text classifier"] = Specimen(
    make=lambda: Net(
        lambda m, x: m.out(F.relu(m.hidden(m.embedding(x).mean(1)))),
        embedding=nn.Embedding(11, 6),
        hidden=nn.Linear(6, 9),
        out=nn.Linear(9, 3),
    ),
    inputs=tokens(11, 5),
    free_exact=2,  # 6, 9
    min_free_share=0.98,  # all but the last bias
)
ZOO["lstm"] = Specimen(
    make=lambda: Net(
        lambda m, x: m.out(F.relu(m.mid(m.lstm(F.relu(m.first(x)))[0][:, -1]))),
        first=nn.Linear(5, 7),
        lstm=nn.LSTM(7, 6, batch_first=True),
        mid=nn.Linear(6, 9),
        out=nn.Linear(9, 3),
    ),
    inputs=drawn(2, 4, 5),
    free_exact=1,  # 9; what goes into the LSTM (7) and comes out of it (6) is frozen
    min_free_share=0.18,  # mid 63 and out's weights 27, of 42 + 360 + 63 + 30
    frozen_by="lstm",
    debatable="a planner that cuts LSTMs has two more (7 and 6)",
)
ZOO["mixer"] = Specimen(
    make=lambda: Net(
        _mixer,
        patches=nn.Conv2d(3, 7, 2, 2),
        norms=nn.ModuleList([nn.LayerNorm(7) for _ in range(3)]),
        mix=nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)),
        mlp=nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 7)),
        out=nn.Linear(7, 3),
    ),
    inputs=drawn(2, 3, 4, 4),
    free_exact=2,  # hidden over the positions 5, hidden over the channels 9; the 4 positions are the input's
    free_inexact=1,  # stream 7
    min_free_share=0.97,  # all but the biases of the last layer (3) and of the positions (4)
)


def _mixer(m: Any, x: Tensor) -> Tensor:
    x = m.patches(x).flatten(2).transpose(1, 2)
    x = x + m.mix(m.norms[0](x).transpose(1, 2)).transpose(1, 2)
    x = x + m.mlp(m.norms[1](x))
    return m.out(m.norms[2](x).mean(1))


ZOO["convnext by hand"] = Specimen(
    make=lambda: Net(
        _convnext,
        stem=nn.Conv2d(3, 6, 2, 2),
        depthwise=nn.Conv2d(6, 6, 7, padding=3, groups=6),
        norm=nn.LayerNorm(6),
        up=nn.Linear(6, 11),
        down=nn.Linear(11, 6),
        scale=bare(6),
        last_norm=nn.LayerNorm(6),
        out=nn.Linear(6, 4),
    ),
    inputs=drawn(2, 3, 8, 8),
    free_exact=1,  # 11
    free_inexact=1,  # stream 6
    min_free_share=0.99,  # all but the last bias
)


def _convnext(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
    x = x + (m.scale * m.down(F.gelu(m.up(y)))).permute(0, 3, 1, 2)
    return m.out(m.last_norm(x.mean((2, 3))))


# --- attention --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention in the ways in which people write it; ``inferred`` says which size of the view is a -1."""

    def __init__(self, width: int, heads: int, dim: int, v_dim: int, *, inferred: str, packed: bool, core: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.v_dim, self.scale = heads, dim, v_dim, dim**-0.5
        self.inferred, self.core = inferred, core
        if packed:
            self.qkv = nn.Linear(width, 3 * heads * dim)
        else:
            self.q, self.k = nn.Linear(width, heads * dim), nn.Linear(width, heads * dim, bias=False)
            self.v = nn.Linear(width, heads * v_dim)
        self.packed, self.mix = packed, nn.Linear(heads * v_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        by_head = self.inferred == "heads"
        if self.packed:
            sizes = (-1, self.head_dim) if by_head else (self.num_heads, -1)
            q, k, v = self.qkv(x).reshape(batch, length, 3, *sizes).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            sizes, v_sizes = ((-1, self.head_dim), (-1, self.v_dim)) if by_head else [(self.num_heads, -1)] * 2
            q, k = (layer(x).view(batch, length, *sizes).transpose(1, 2) for layer in (self.q, self.k))
            v = self.v(x).view(batch, length, *v_sizes).transpose(1, 2)
        if self.core == "matmul":
            y = torch.softmax(q @ k.transpose(-2, -1) * self.scale, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale if self.core == "scale" else None)
        return self.mix(y.transpose(1, 2).reshape(batch, length, -1))


class Transformer(nn.Module):
    """One pre-norm block between an embedding with positions and a classifier."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.position, self.attention = nn.Linear(5, width), bare(1, 6, width), attention
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.mlp = nn.Sequential(nn.Linear(width, 13), nn.GELU(), nn.Linear(13, width))
        self.out = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.out(self.norms[2](x).mean(1))


def attention(free_exact: int, *sizes: int, debatable: str = "", **options: Any) -> Specimen:
    """Always free: the stream (10, inexact), which covers all but the last bias, and the hidden width of the MLP."""
    return Specimen(
        make=lambda: Transformer(10, Attention(10, *sizes, **options)),
        inputs=drawn(2, 6, 5),
        free_exact=free_exact,
        free_inexact=1,
        min_free_share=0.98,  # without the last bias (7), and q's (12) where q is frozen: 1098 of 1117
        debatable=debatable,
    )


FROZEN_BY_ATTRIBUTE = "one fewer for each size that is an attribute of the module, if a cut can't update it"
# 13; whole heads, inferred: 3; dimensions, the same for q, k and v, which one reshape makes, an attribute: 4.
ZOO["attention, packed, by heads"] = attention(
    3, 3, 4, 4, inferred="heads", packed=True, core="scale", debatable=FROZEN_BY_ATTRIBUTE
)
# 13; the same with the heads an attribute and the dimensions inferred.
ZOO["attention, packed, by dimension"] = attention(
    3, 3, 4, 4, inferred="dim", packed=True, core="scale", debatable=FROZEN_BY_ATTRIBUTE
)
# 13; whole heads, inferred: 3; dimensions of q and k: 4, of v: 5, each an attribute.
ZOO["attention, by heads"] = attention(
    4, 3, 4, 5, inferred="heads", packed=False, core="matmul", debatable=FROZEN_BY_ATTRIBUTE
)
# 13; dimensions of q and k: 4, of v: 5, inferred; whole heads, an attribute: 3.
ZOO["attention, by dimension"] = attention(
    4, 3, 4, 5, inferred="dim", packed=False, core="matmul", debatable=FROZEN_BY_ATTRIBUTE
)
# The same with the scale as an argument.
ZOO["attention, by dimension, own scale"] = attention(
    4, 3, 4, 5, inferred="dim", packed=False, core="scale", debatable=FROZEN_BY_ATTRIBUTE
)
# The same without the dimensions of q and k, which set the scale.
ZOO["attention, by dimension, default scale"] = attention(
    3, 3, 4, 5, inferred="dim", packed=False, core="default", debatable=FROZEN_BY_ATTRIBUTE
)
# 13; whole heads, inferred, which leave the scale as it is: 3; dimensions of v, an attribute: 5.
ZOO["attention, by heads, default scale"] = attention(
    3, 3, 4, 5, inferred="heads", packed=False, core="default", debatable=FROZEN_BY_ATTRIBUTE
)


class TorchAttention(nn.Module):
    """Self-attention by torch's own module."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


ZOO["multi-head attention of torch"] = Specimen(
    make=lambda: Transformer(12, TorchAttention(12, 3)),
    inputs=drawn(2, 6, 5),
    # torch's own forward insists on as many rows for each of q, k, v as columns, and derives the scale from them; the
    # one that a cut puts in its place does not: 13, heads (3), dimensions (4), and the stream (12).
    free_exact=3,
    free_inexact=1,
    min_free_share=0.98,
)


# --- transformers -----------------------------------------------------------------------------------------------------


def pretrained(model: str, *, attn: str = "", **options: Any) -> Callable[[], nn.Module]:
    """A network of the transformers package with random weights; ``model`` is the class's name."""

    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, model)
        config = cls.config_class(**options)
        if attn:
            config._attn_implementation = attn
        return cls(config)

    return make


VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 17,
    "image_size": 8,
    "patch_size": 4,
}
BERT = {
    "hidden_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 17,
    "vocab_size": 31,
    "max_position_embeddings": 13,
}
LLAMA = {
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,  # 4 x 6 is not the 20 of the stream
    "intermediate_size": 17,
    "vocab_size": 29,
    "max_position_embeddings": 13,
    "use_cache": False,
}

ZOO["vit"] = Specimen(
    make=pretrained("ViTForImageClassification", attn="sdpa", num_labels=5, **VIT),
    inputs=drawn(2, 3, 8, 8),
    free_exact=4,  # in each layer: 3 heads, hidden 17; head_dim is that of q and k and that of v at once
    free_inexact=1,  # stream 24
    min_free_share=0.99,  # all but the last bias
)
ZOO["vit, features"] = Specimen(
    make=pretrained("ViTModel", attn="eager", **VIT),
    inputs=drawn(2, 3, 8, 8),
    free_exact=4,  # as above; the stream is the output
    min_free_share=0.739,  # in each layer 4 x 24 x 24 + 3 x 24 and 2 x 24 x 17 + 17: 6418 of 8674
)
ZOO["swin"] = Specimen(
    make=pretrained(
        "SwinForImageClassification",
        attn="eager",
        image_size=16,
        patch_size=2,
        embed_dim=12,
        depths=[2, 1],
        num_heads=[2, 3],
        window_size=4,
        mlp_ratio=1.5,
        drop_path_rate=0.0,
        num_labels=5,
    ),
    inputs=drawn(2, 3, 16, 16),
    free_exact=6,  # in each of three layers: heads (2, 2, 3), hidden (18, 18, 36)
    free_inexact=2,  # the streams 12 and 24
    min_free_share=0.99,  # all but the last bias
)
ZOO["bert"] = Specimen(
    make=pretrained("BertForSequenceClassification", attn="sdpa", num_labels=5, **BERT),
    inputs=lambda: {"input_ids": tokens(31, 6)()},
    free_exact=5,  # in each layer: 3 heads, hidden 17; the pooler's 21
    free_inexact=1,  # stream 21
    min_free_share=0.99,  # all but the last bias
)
ZOO["bert, features"] = Specimen(
    make=pretrained("BertModel", attn="eager", **BERT),
    inputs=lambda: {"input_ids": tokens(31, 6)(), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])},
    free_exact=4,  # in each layer: 3 heads, hidden 17; the stream and the pooler are outputs
    min_free_share=0.74,  # in each layer 4 x 21 x 21 + 3 x 21 and 2 x 21 x 17 + 17: 5116 of 6838
)
ZOO["gpt2"] = Specimen(
    make=pretrained(
        "GPT2LMHeadModel",
        attn="eager",
        n_embd=20,
        n_layer=2,
        n_head=4,
        n_inner=18,
        vocab_size=29,
        n_positions=13,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    ),
    inputs=lambda: {"input_ids": tokens(29, 6)()},
    free_exact=6,  # in each layer: 4 heads, 5 dimensions (q, k and v are equal parts of one layer), hidden 18
    free_inexact=1,  # stream 20, which is also the tied embedding's; the vocabulary is the output
    min_free_share=0.97,  # all; without the heads all but 2 x 60 biases of c_attn
    debatable="heads and dimensions need split_size and head_dim to be updated: else 2",
)
ZOO["llama"] = Specimen(
    make=pretrained("LlamaForCausalLM", attn="eager", **LLAMA),
    inputs=lambda: {"input_ids": tokens(29, 6)()},
    free_exact=4,  # in each layer: 2 key-value heads with their 2 queries each, hidden 17
    free_inexact=1,  # stream 20
    min_free_share=0.99,  # all: there are no biases
    debatable="queries of every key-value head (2), if the attribute num_key_value_groups is updated: two more",
)
ZOO["llama, sdpa"] = Specimen(
    make=pretrained("LlamaForCausalLM", attn="sdpa", **LLAMA),
    inputs=lambda: {"input_ids": tokens(29, 6)()},
    free_exact=4,
    free_inexact=1,
    min_free_share=0.99,
    debatable="sdpa without a mask infers how many queries share a key-value head: those 2 may be free too, then 6",
)
ZOO["convnext"] = Specimen(
    make=pretrained(
        "ConvNextForImageClassification",
        num_stages=2,
        hidden_sizes=[6, 10],
        depths=[1, 1],
        patch_size=2,
        num_labels=5,
        image_size=8,
    ),
    inputs=drawn(2, 3, 8, 8),
    free_exact=2,  # hidden 24 and 40
    free_inexact=2,  # the streams 6 and 10
    min_free_share=0.99,  # all but the last bias
)
ZOO["regnet"] = Specimen(
    make=pretrained(
        "RegNetForImageClassification",
        layer_type="y",
        embedding_size=6,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        groups_width=4,
        num_labels=5,
    ),
    inputs=drawn(2, 3, 16, 16),
    # Stem 6. In each stage: the stream (8, 12), the squeezed width (2, 2), and of the grouped convolution (8 = 2 x 4,
    # 12 = 3 x 4) the inputs within the groups, the outputs within the groups, and the groups.
    free_exact=11,
    min_free_share=0.99,  # all but the last bias
    debatable="whole convolution groups (2, 3) may not be offered: then 9",
)
