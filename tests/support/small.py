"""A LightningModule that has what breaks things (dropout, batch norm, momentum, weight decay), and data for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, SAMPLES, BATCH = 12, 3, 96, 8


class SmallBlock(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv2(F.relu(self.conv1(x)))))


class SmallNet(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu, *, residual: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv1d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        if residual:
            self.block1, self.block2 = SmallBlock(), SmallBlock()
        self.residual = residual
        self.hidden = nn.Linear(6 * FEATURES, 16)
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.conv(x.unsqueeze(1))))
        if self.residual:
            x = self.block2(self.block1(x))
        return self.head(self.dropout(self.activation(self.hidden(x.flatten(1)))))


class SmallModule(LightningModule):
    def __init__(
        self, optimizer: str = "sgd", activation: Callable[[Tensor], Tensor] = F.relu, *, residual: bool = False
    ) -> None:
        super().__init__()
        self.net = SmallNet(activation, residual=residual)
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("test_acc", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1e-2)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ManualModule(SmallModule):
    """Two optimizers that step by hand within one batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = [*self.net.conv.parameters(), *self.net.norm.parameters()]
        second = [*self.net.hidden.parameters(), *self.net.head.parameters()]
        return [torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.Adam(second, lr=1e-2)]


def dataset(seed: int = 0, samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator)
    teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    return TensorDataset(x, (x @ teacher).argmax(1))


def shuffled(seed: int = 0, batch: int = BATCH) -> DataLoader:
    """A plain shuffled loader: it draws its order from torch's global generator."""
    return DataLoader(dataset(seed), batch_size=batch, shuffle=True)


def plain(seed: int = 1, batch: int = BATCH) -> DataLoader:
    return DataLoader(dataset(seed), batch_size=batch)


class StatefulLoader:
    """Shuffles from (seed, epoch) and can be resumed in the middle of an epoch."""

    def __init__(self, batch: int = BATCH) -> None:
        self.dataset = dataset()
        self.batch = batch
        self.sampler = self
        self.epoch = self.position = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SAMPLES // self.batch

    def __iter__(self) -> Iterator[list[Tensor]]:
        start = self.position % len(self)  # the Trainer stops after the last batch, without exhausting the iterator
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch))
        for index in range(start, len(self)):
            self.position = index + 1
            chosen = order[index * self.batch : (index + 1) * self.batch]
            yield [tensor[chosen] for tensor in self.dataset.tensors]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def quiet_trainer(**options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(defaults | options))
