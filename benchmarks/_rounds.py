"""What benchmarks of rewinding share: ways to go on from one checkpoint, in which the last pruning is still to come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import LotteryTicketCallback


class EndOfRound(ModelCheckpoint):
    """Saves the whole state after so many epochs, and ends the fit."""

    def __init__(self, folder: Path, epochs: int) -> None:
        super().__init__(folder, filename="trained", every_n_epochs=epochs, save_on_train_epoch_end=True)
        self.epochs = epochs
        self.path = folder / "trained.ckpt"

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def handed_over(trained: Path, writer: LotteryTicketCallback, reader: LotteryTicketCallback) -> Path:
    """The checkpoint of one callback, for another one that differs in what the last pruning does."""
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["callbacks"] = {reader.state_key: checkpoint["callbacks"][writer.state_key]}
    path = trained.with_name("handed_over.ckpt")
    torch.save(checkpoint, path)
    return path
