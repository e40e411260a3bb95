"""Where exits can be, and at which share of a network's multiply-accumulates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.early_exit.placing import exit_candidates, place_exits


class Blocks(nn.Module):
    """A layer that runs twice, one that does not run, one that returns a tuple, residual blocks of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.unused, self.rnn = nn.Linear(4, 4), nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        x = self.rnn(x[:, None])[0][:, 0]
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 30), nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def test_candidates_have_the_cost_up_to_their_end() -> None:
    found = {one.name: one for one in exit_candidates(Blocks(), torch.randn(3, 4))}
    names = [name for i in range(4) for name in (f"blocks.{i}.up", f"blocks.{i}.down", f"blocks.{i}")]
    assert list(found) == names  # the last layer has nothing after it
    macs, total = 2 * 16 + 2 * 3 * 16, 2 * 16 + 2 * 3 * 16 + 4 * 240 + 8
    for i in range(4):
        assert found[f"blocks.{i}.up"].share == (macs + 240 * i + 120) / total
        assert found[f"blocks.{i}"].share == found[f"blocks.{i}.down"].share == (macs + 240 * i + 240) / total
        assert [found[f"blocks.{i}{part}"].tensors for part in (".up", ".down", "")] == [2, 2, 1]
    assert (found["blocks.0.up"].shape, found["blocks.0"].shape) == ((30,), (4,))


def test_exits_are_placed_at_the_ends_of_blocks() -> None:
    model = Blocks()
    assert place_exits(model, torch.randn(3, 4), (0.25, 0.5, 0.75)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert place_exits(model, torch.randn(3, 4), (0.97, 0.98)) == ["blocks.3.up", "blocks.3"]  # each once
    with pytest.raises(ValueError, match="Blocks has 8 places for exits, and 9 are wanted"):
        place_exits(model, torch.randn(3, 4), [0.1 * i for i in range(1, 10)])
    with pytest.raises(ValueError, match=r"fractions=\(0.5, 0.2\): pass ascending shares"):
        place_exits(model, torch.randn(3, 4), (0.5, 0.2))


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x if float(x.detach().sum()) < 1e9 else -x)


def test_a_network_that_cannot_be_cut_has_exits_for_whole_batches() -> None:
    (one,) = exit_candidates(Asks(), torch.randn(3, 4))
    assert (one.name, one.share, one.tensors) == ("a", 0.5, None)
    assert place_exits(Asks(), torch.randn(3, 4), (0.5,)) == ["a"]
