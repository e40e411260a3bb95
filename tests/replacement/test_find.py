"""Which layers may be replaced: each refusal has its reason in words."""

from __future__ import annotations

import pytest
import torch
from support.forms import replace
from torch import Tensor, nn

from lightning_compress.measure.macs import count_macs
from lightning_compress.replacement.find import find_layers


def test_layers_have_their_calls_shapes_and_macs() -> None:
    net, x = (
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, padding=1), nn.Flatten(2), nn.Linear(16, 8), nn.Linear(8, 8)),
        torch.zeros(3, 2, 4, 4),
    )
    found = find_layers(net, x)
    assert list(found.layers) == ["0", "2", "3"]
    assert not found.refused
    assert found.layers["2"].inputs == ((3, 4, 16),)
    assert sum(one.macs for one in found.layers.values()) == count_macs(net, x)[0]


class Network(nn.Module):
    """One layer for each reason."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.plain, self.twice, self.frozen, self.unused = (nn.Linear(8, 8) for _ in range(4))
        self.frozen.weight.requires_grad_(False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.read = nn.Linear(8, 8)
        self.asked = nn.Linear(8, 8)
        self.up = nn.ConvTranspose1d(8, 8, 1)
        self.small = replace(nn.Sequential(nn.Linear(8, 8)), {"0": 2})
        self.compiled = nn.Sequential(nn.Linear(8, 8))
        self.compiled.compile(backend="eager")
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.twice(self.twice(self.plain(self.embed(ids))))
        x = self.encoder(self.attention(x, x, x)[0])
        x = x + self.read(x) * self.read.weight.norm()
        x = self.asked(x.to(self.asked.weight.dtype)) if self.asked.weight.shape[0] == 8 else x
        x = self.up(self.frozen(x).mT).mT
        return self.out(self.compiled(self.small(x)))


def test_every_refusal_has_its_reason() -> None:
    net, ids = Network(), torch.tensor([[1, 2, 3]])
    found = find_layers(net, ids)
    assert list(found.layers) == ["plain", "twice", "encoder.linear1", "encoder.linear2", "asked"]
    assert found.layers["twice"].calls == 2
    assert found.layers["twice"].macs == 2 * 3 * 64
    reasons = {
        "embed": "also that of 'out'",
        "out": "also that of 'embed'",
        "frozen": "requires_grad=False",
        "unused": "never reach it",
        "attention.out_proj": "reads its weight",
        "encoder.self_attn.out_proj": "reads its weight",
        "read": "reads its weight, by .*norm",
        "up": "transposed",
        "small.0": "replaced already, by the form 'two_parts'",
        "small.0.first": "a part of 'small.0'",
        "small.0.second": "a part of 'small.0'",
        "compiled.0": "inside 'compiled'",
    }
    assert set(found.refused) == set(reasons)
    for path, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found.refused[path])


def test_tied_layers_are_found_together_when_asked_for() -> None:
    net, ids = Network(), torch.tensor([[1, 2, 3]])
    found = find_layers(net, ids, tied=True)
    assert found.layers["embed"].tied == ("out",)
    assert found.layers["out"].tied == ("embed",)
    net.unused.weight = net.embed.weight = net.out.weight = nn.Parameter(torch.randn(9, 8))
    found = find_layers(net, ids, tied=True)
    assert "can't be replaced: the example inputs never reach it" in found.refused["embed"]
