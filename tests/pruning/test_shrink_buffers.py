"""Channels behind frozen norms and mask buffers are pruned: a shift that is a buffer is masked like a bias."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from support.small import SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import IterativePruningCallback, load_compressed, save_compressed


class FrozenNorm(nn.Module):
    """What torchvision's detectors have in place of every batch norm: nothing but buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.rand(channels, generator=generator) + 0.5)
        self.register_buffer("bias", torch.randn(channels, generator=generator))
        self.register_buffer("running_mean", torch.randn(channels, generator=generator))
        self.register_buffer("running_var", torch.rand(channels, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale + (self.bias - self.running_mean * scale)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 10), FrozenNorm(10)
        self.second, self.last = nn.Linear(10, 8), nn.Linear(8, 3)
        self.register_buffer("factor", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.last(F.relu(self.second(x)) * self.factor)


class Module(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


def run(shrink: str) -> Module:
    seed_everything(1, verbose=False)
    module = Module()
    pruning = IterativePruningCallback(
        0.5, granularity="neuron", scope="layer", end_epoch=2.0, every_n_steps=6, shrink=shrink
    )
    quiet_trainer(callbacks=[pruning]).fit(module, shuffled(), plain())
    return module.eval()


@pytest.mark.filterwarnings("ignore")
def test_a_frozen_norm_is_masked_and_then_cut(tmp_path: Any) -> None:
    masked = run("never")
    gone = {name: (masked.net.get_submodule(name).weight == 0).all(1) for name in ("first", "second")}
    assert [int(one.sum()) for one in gone.values()] == [5, 4]
    norm, fresh = masked.net.norm, FrozenNorm(10)
    assert torch.equal(norm.weight, fresh.weight.masked_fill(gone["first"], 0))
    assert torch.equal(norm.bias, fresh.bias.masked_fill(gone["first"], 0))
    assert torch.equal(norm.running_mean, fresh.running_mean)
    assert torch.equal(norm.running_var, fresh.running_var)
    assert torch.equal(masked.net.factor, torch.ones(8))
    # By hand: the network without the columns that read what is silent.
    small = copy.deepcopy(masked.net)
    small.second.weight.data[:, gone["first"]] = 0
    small.last.weight.data[:, gone["second"]] = 0
    torch.testing.assert_close(masked(X), small(X))
    thin = run("on_fit_end")
    assert (thin.net.first.out_features, thin.net.second.out_features) == (5, 4)
    assert thin.net.norm.bias.shape == (5,)
    assert thin.net.factor.shape == (4,)
    torch.testing.assert_close(thin(X), masked(X))
    save_compressed(thin, tmp_path / "thin.lcz")
    torch.testing.assert_close(load_compressed(tmp_path / "thin.lcz", Module()).eval()(X), thin(X))


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_saved_is_not_masked() -> None:
    class Unsaved(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.norm.bias
            self.norm.register_buffer("bias", torch.ones(10), persistent=False)

    class Other(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Unsaved()

    seed_everything(1, verbose=False)
    module = Other()
    pruning = IterativePruningCallback(0.5, granularity="neuron", target="net.first", end_epoch=2.0)
    with pytest.raises(ValueError, match=r"net\.norm\.bias makes them as well, which is not saved"):
        quiet_trainer(callbacks=[pruning]).fit(module, shuffled(), plain())
