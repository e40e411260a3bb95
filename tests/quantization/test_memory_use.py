"""What a step needs beside weights, gradients and real values: a few times the largest layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.memory import LiveBytes
from torch import nn

from lightning_compress.binary.weights import binarize_weights
from lightning_compress.core.latent import LatentWeights
from lightning_compress.quantization.weights import quantize_weights

WEIGHTS: dict[str, Callable[[nn.Module], LatentWeights]] = {
    "signs": binarize_weights,
    "samples": lambda net: binarize_weights(net, mode="stochastic"),
    "xnor": lambda net: binarize_weights(net, scaling="mean"),
    "8 bits": lambda net: quantize_weights(net, 8),
    "4 bits": lambda net: quantize_weights(net, 4),
}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_step_makes_no_more_than_a_few_copies_of_a_layer(kind: str, pruned: bool) -> None:
    net = nn.Linear(512, 512, bias=False)
    if pruned:
        net.weight.data[::2, ::3] = 0.0
    weights = WEIGHTS[kind](net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.randn(4, 512)).square().sum().backward()
    with LiveBytes() as counted:
        weights.open(optimizer)
        optimizer.step()
        weights.close(optimizer)
    assert counted.most <= 3.0 * 4 * net.weight.numel()
