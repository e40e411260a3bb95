"""Run a module's own validation over a loader for what its network gets and returns; nothing is logged or saved."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_compress.core.evaluation import random_state_restored


def validate_quietly(module: LightningModule, loader: Any, trainer: Trainer | None, *, batches: float = 1.0) -> None:
    """Run the module's validation step over a loader, with its transforms, precision and device.

    Args:
        module: The module, which keeps its own Trainer.
        loader: Or a LightningDataModule.
        trainer: Runs the validation; None: one for the device that the module is on.
        batches: As `Trainer(limit_val_batches=...)`, for a Trainer that is made here.
    """
    was = module._trainer
    runs = trainer or Trainer(
        accelerator="gpu" if module.device.type == "cuda" else "cpu",
        devices=1,
        logger=DummyLogger(),  # for hooks that call the logger themselves
        limit_val_batches=batches,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        with random_state_restored(module):
            runs.validate(module, loader, verbose=False)
    finally:
        module._trainer = was
