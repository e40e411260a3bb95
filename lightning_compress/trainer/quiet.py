"""Run a module's own validation over a loader for what its network gets and returns; nothing is logged or saved."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_compress.core.evaluation import random_state_restored
from lightning_compress.trainer.unwrap import innermost


def validate_quietly(
    module: LightningModule, loader: Any, trainer: Trainer | None, *, batches: int | None = None
) -> None:
    """Run the module's validation step over a loader, with its transforms, precision and device.

    Args:
        module: The module, which keeps its own Trainer.
        loader: Or a LightningDataModule.
        trainer: Runs the validation; None: one for the device that the module is on.
        batches: As `Trainer(limit_val_batches=...)`, for a Trainer that is made here.

    Raises:
        ValueError: The module has no validation step, or the loader is none.
    """
    own = innermost(module)
    if not is_overridden("validation_step", own):
        raise ValueError(
            f"{type(own).__name__} has no validation_step, which runs here over the loader: write one that calls the "
            f"network."
        )
    given = isinstance(loader, LightningDataModule)
    if loader is None or (given and not is_overridden("val_dataloader", loader)):
        what = f"{type(loader).__name__} has no val_dataloader" if given else "The loader is None"
        raise ValueError(f"{what}: pass a loader, or a LightningDataModule with a val_dataloader.")
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
