"""What a step needs beside weights, gradients and real values: a few times the largest layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_compress.quantization.binary_weights import binarize_weights
from lightning_compress.quantization.latent import LatentWeights
from lightning_compress.quantization.uniform_weights import quantize_weights


class Peak(TorchDispatchMode):
    """The most bytes alive at once of what operators have made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and (storage := one.untyped_storage())._cdata not in before | self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.alive)
        return result

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


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
    with Peak() as peak:
        weights.open(optimizer)
        optimizer.step()
        weights.close(optimizer)
    assert peak.most <= 3.0 * 4 * net.weight.numel()
