"""An embedding and the output matrix of the same weight: exact at full rank, known losses, one shared factor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.compare import differences
from torch import Tensor, nn

from lightning_compress.low_rank.choose import Chooser
from lightning_compress.low_rank.sites import Seen
from lightning_compress.low_rank.splits import Moments
from lightning_compress.low_rank.tied import TiedSite
from lightning_compress.replacement.find import Layer
from lightning_compress.replacement.layer import linear_map
from lightning_compress.replacement.swap import swap

ENTRIES, WIDTH = 20, 6


class Tied(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.output = nn.Embedding(ENTRIES, WIDTH), nn.Linear(WIDTH, ENTRIES, bias=bias)
        self.output.weight = self.embedding.weight
        self.double()

    def forward(self, entries: Tensor) -> Tensor:
        return self.output(self.embedding(entries).tanh())


def hidden() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(200, WIDTH, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) + 1.0


def shares() -> Tensor:
    counts = torch.arange(1, ENTRIES + 1, dtype=torch.float64)
    return counts / counts.sum()


def seen(layer: nn.Module, *shape: int) -> Layer:
    return Layer(map=linear_map(layer), calls=1, inputs=(shape,), macs=0)


def site(network: Tied, *, data: bool = True) -> TiedSite:
    x = hidden()
    centred = x - x.mean(0)
    moments = [Moments(x.mean(0), centred.T @ centred / len(x))]
    return TiedSite(
        ("embedding", Seen(seen(network.embedding, 2, 3), shares() if data else None)),
        ("output", Seen(seen(network.output, 2, 3, WIDTH), moments if data else None)),
    )


def replaced(network: Tied, one: TiedSite, rank: int) -> Any:
    for path, (form, numbers, values) in one.values("tied_embedding", (rank,)).items():
        swap(network.get_submodule(path), form, numbers, values)
    return network


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_highest_rank_computes_the_same(bias: bool, data: bool) -> None:
    dense = Tied(bias=bias)
    thin = replaced(copy.deepcopy(dense), site(dense, data=data), WIDTH)
    entries = torch.arange(ENTRIES)
    torch.testing.assert_close(thin(entries), dense(entries), rtol=1e-10, atol=1e-10)
    assert thin.embedding.first.weight is thin.output.second.weight


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_is_what_both_lose(bias: bool) -> None:
    dense = Tied(bias=bias)
    x, entries = hidden(), torch.arange(ENTRIES)
    for rank in range(1, WIDTH):
        one = site(dense)
        thin = replaced(copy.deepcopy(dense), one, rank)
        y, z = dense.output(x), thin.output(x)
        if bias:
            torch.testing.assert_close(y.mean(0), z.mean(0))
        variance = (y - y.mean(0) if bias else y).square().sum()
        of_output = float((y - z).square().sum() / variance)
        change = (dense.embedding(entries) - thin.embedding(entries)).square().sum(1)
        of_embedding = float(shares() @ change / (shares() @ dense.embedding.weight.data.square().sum(1)))
        kept = (1 - of_output) * (1 - of_embedding)
        assert one.lost("tied_embedding", [(rank,)])[0] == pytest.approx(1 - kept, abs=1e-9)
        # the embedding's own factor is the least squares: its gradient is zero
        slope = thin.embedding.first.weight.T @ (
            shares()[:, None] * (thin.embedding(entries) - dense.embedding(entries))
        )
        assert float(slope.abs().max()) < 1e-9


def test_what_they_cost_is_counted_once() -> None:
    network = Tied(bias=True)
    one = site(network)
    (found,) = Chooser({"embedding": one}, "parameters", lambda: 0.0).by_rank({"embedding": 2}).values()
    assert found.before.parameters == sum(parameter.numel() for parameter in network.parameters())
    replaced(network, one, 2)
    assert found.after.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert found.before.macs == 6 * ENTRIES * WIDTH
    assert found.after.macs == 6 * (2 * WIDTH + WIDTH * 2 + 2 * ENTRIES)


def test_both_train_the_shared_factor() -> None:
    network = replaced(Tied(), site(Tied()), 3)
    before = copy.deepcopy(network.state_dict())
    network(torch.arange(4)).square().sum().backward()
    assert float(network.embedding.first.weight.grad[10:].abs().max()) > 0  # by the output matrix alone
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert network.embedding.first.weight is network.output.second.weight
    assert differences(before, network.state_dict())
