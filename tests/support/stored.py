"""The networks of tests/data, which tests/data/write.py trained and wrote: their classes may not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class _Module(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Heads(_Module):
    """Attention whose heads are cut, a convolution whose groups are, and a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.join = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1, groups=4), nn.Conv1d(8, 8, 1)
        self.layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 12), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(torch.relu(self.stem(x.unflatten(1, (8, 4))))))
        x = self.layer(self.join(x).transpose(1, 2)).mean(1)
        result: Tensor = self.head(torch.relu(self.hidden(x)) * self.scale)
        return result


class Layers(_Module):
    """A convolution and two linear layers, whose inputs are changed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6)
        self.hidden, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x.unflatten(1, (8, 4)))).flatten(1)
        result: Tensor = self.head(torch.tanh(self.hidden(x)))
        return result


NETWORKS: dict[str, Callable[[], _Module]] = {"heads": Heads, "grids": Layers, "signs": Layers}


def outputs(module: nn.Module) -> Tensor:
    """Return what a network, in double precision, gives for fixed inputs, as single: the same bits on every machine."""
    x = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = module.double().eval()(x).float()
    return result
