"""Queries, keys and values of one linear layer, each with a rank of its own."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_compress.low_rank import lower_rank, merge
from lightning_compress.low_rank.packed import PackedSite
from lightning_compress.low_rank.sites import Seen
from lightning_compress.low_rank.splits import Moments
from lightning_compress.replacement.find import Layer
from lightning_compress.replacement.layer import linear_map
from lightning_compress.replacement.swap import swap

WIDTH = 5


def packed(kind: str) -> Any:
    """Queries of low rank, keys of a middle one, values of full rank."""
    torch.manual_seed(0)
    layer: Any = Conv1D(3 * WIDTH, WIDTH) if kind == "Conv1D" else nn.Linear(WIDTH, 3 * WIDTH, bias=kind == "Linear")
    layer = layer.double()
    thirds = [torch.randn(WIDTH, r).double() @ torch.randn(r, WIDTH).double() for r in (1, 2, WIDTH)]
    weight = torch.cat(thirds)
    layer.weight.data.copy_(weight.T if kind == "Conv1D" else weight)
    return layer


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 9, WIDTH, generator=generator, dtype=torch.float64) + 1.0


def site(layer: Any) -> PackedSite:
    rows = inputs().reshape(-1, WIDTH)
    centred = rows - rows.mean(0)
    moments = [Moments(rows.mean(0), centred.T @ centred / len(rows))]
    seen = Layer(map=linear_map(layer), calls=1, inputs=(tuple(inputs().shape),), macs=0)
    return PackedSite("layer", Seen(seen, moments))


@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D"])
def test_its_loss_and_its_values_are_those_of_the_thirds(kind: str) -> None:
    layer = packed(kind)
    one, x = site(layer), inputs()
    y = layer(x)
    centred = y if layer.bias is None else y - y.mean((0, 1))
    for numbers in [(1, 1, 1), (1, 2, 3), (2, 1, 4), (WIDTH, WIDTH, WIDTH)]:
        thin = copy.deepcopy(layer)
        swap(thin, *one.values("packed", numbers)["layer"])
        change = float((thin(x) - y).square().sum() / centred.square().sum())
        assert one.lost("packed", [numbers])[0] == pytest.approx(change, abs=1e-9)
        costs = one.costs("packed", numbers)
        assert costs.parameters == sum(parameter.numel() for parameter in thin.parameters())
        assert costs.macs == 36 * sum(numbers) * 2 * WIDTH
        expected = thin(x)
        torch.testing.assert_close(merge(nn.Sequential(thin))(x), expected)
    torch.testing.assert_close(thin(x), y, rtol=1e-10, atol=1e-10)


def test_the_ranks_that_are_considered_lose_least_for_their_sum() -> None:
    one = site(packed("Linear"))
    every = list(itertools.product(range(1, WIDTH + 1), repeat=3))
    lost = dict(zip(every, one.lost("packed", every), strict=True))
    for numbers in one.numbers("packed"):
        best = min(value for other, value in lost.items() if sum(other) == sum(numbers))
        assert lost[numbers] == pytest.approx(best, abs=1e-12)
    assert (1, 2, 4) in one.numbers("packed")


def test_gpt2_gets_ranks_by_parts_where_they_differ() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    network = GPT2LMHeadModel(config).eval()
    attention: Any = network.transformer.h[0].attn.c_attn
    with torch.no_grad():
        for k in (0, 1):  # queries and keys of rank 1
            attention.weight[:, 16 * k : 16 * k + 16] = torch.outer(torch.randn(16), torch.randn(16)) / 50
    tokens = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    expected = network(tokens).logits
    report = lower_rank(network, tokens, energy=0.999999, target="*c_attn", batches=[tokens])
    assert report.replaced["transformer.h.0.attn.c_attn"].option.form == "packed"
    assert (attention.numbers["rank_0"], attention.numbers["rank_1"]) == (1, 1)
    assert (attention.nx, attention.nf) == (16, 48)
    torch.testing.assert_close(network(tokens).logits, expected, rtol=1e-2, atol=1e-2)
