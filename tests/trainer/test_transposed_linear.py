"""GPT-2's `Conv1D` is a linear layer with a transposed weight: every technique treats the two alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from support.small import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)

transformers = pytest.importorskip("transformers.pytorch_utils")

TECHNIQUES: dict[str, Callable[[], Callback]] = {
    "weights": lambda: IterativePruningCallback(0.5),
    "weights-taylor": lambda: IterativePruningCallback(0.5, criterion="taylor", start_epoch=1.0),
    "neurons": lambda: IterativePruningCallback(0.5, granularity="neuron", shrink="never"),
    "neurons-cut": lambda: IterativePruningCallback(0.5, granularity="neuron", scope="layer", shrink="during_fit"),
    "lasso-filter": lambda: GroupLassoCallback(0.2, granularity="filter", proximal=True),
    "lasso-channel": lambda: GroupLassoCallback(0.2, granularity="channel", proximal=True),
    "lasso-group": lambda: GroupLassoCallback(0.2, granularity="group", proximal=True),
    "clustering": lambda: WeightClusteringCallback(4),
    "binary": lambda: BinaryWeightsCallback(lr_scale="glorot"),
    "xnor": lambda: BinaryWeightsCallback(scaling="mean", activations=["net.2"]),  # with more, signs of sums near 0
    "qat": lambda: QuantizationAwareTrainingCallback(3, 8),
    "qat-tensor": lambda: QuantizationAwareTrainingCallback(4, None, granularity="tensor"),
}


class Module(LightningModule):
    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        layers = [nn.Linear(6, 10), nn.Hardtanh(), nn.Linear(10, 8), nn.Hardtanh(), nn.Linear(8, 3)]
        generator = torch.Generator().manual_seed(1)
        for index in (0, 2, 4):
            weight = torch.randn(layers[index].weight.shape, generator=generator) / 2
            if transposed:
                layers[index] = transformers.Conv1D(*weight.shape)
            with torch.no_grad():
                layers[index].weight.copy_(weight.T if transposed else weight)
                layers[index].bias.zero_()
        self.net = nn.Sequential(*layers).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_both_layers_end_alike(technique: str) -> None:
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)
    plain, transposed = Module(transposed=False), Module(transposed=True)
    for module in (plain, transposed):
        quiet_trainer(callbacks=[TECHNIQUES[technique]()], max_epochs=3).fit(module, loader)
    for index in (0, 2, 4):
        torch.testing.assert_close(transposed.net[index].weight.T, plain.net[index].weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(transposed.net[index].bias, plain.net[index].bias, rtol=1e-9, atol=1e-9)
