"""How often planning runs a network, which is what it costs: once more for no block that is like another one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.channels.find import channel_groups

WIDTH, HEADS = 12, 3


class Attention(nn.Module):
    """Its reshapes name their sizes, so that a trial has to find what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        qkv = self.qkv(x).reshape(batch, places, 3, HEADS, width // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, places, width))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


def calls(monkeypatch: pytest.MonkeyPatch, blocks: int) -> Counter[str]:
    """How often planning calls the network, its blocks, and their attention."""
    counted: Counter[str] = Counter()

    def counting(kind: Any) -> Any:
        def forward(self: nn.Module, x: Tensor) -> Any:
            counted[kind.__name__] += 1
            return dense(self, x)

        dense = kind.forward
        return forward

    with monkeypatch.context() as patch:
        for kind in (Transformer, Block, Attention):
            patch.setattr(kind, "forward", counting(kind))
        groups = channel_groups(Transformer(blocks), torch.randn(2, 4, 5))
    assert len(groups.free()) == 3 * blocks  # heads, their width, and the inside of the perceptron
    return counted


def test_a_network_of_twice_as_many_blocks_takes_no_more_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = calls(monkeypatch, 3), calls(monkeypatch, 6)
    assert many["Transformer"] == few["Transformer"] <= 18
    assert many["Block"] <= 2 * few["Block"]
    assert many["Attention"] <= 2 * few["Attention"]
