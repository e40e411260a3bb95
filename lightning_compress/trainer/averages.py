"""Averaged copies of the weights (EMA and the like) must be projected as the weights are."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn


def check_averages(trainer: Trainer, callback: Callback) -> None:
    """Raise a ValueError for an averaging callback whose copy could not be kept projected."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    name = type(callback).__name__
    for other in callbacks:
        if isinstance(other, StochasticWeightAveraging):
            raise ValueError(
                f"StochasticWeightAveraging replaces the weights by an average that {name} does not see. Use "
                f"Lightning's WeightAveraging or EMAWeightAveraging, which {name} supports."
            )
        if isinstance(other, WeightAveraging) and callbacks.index(other) > callbacks.index(callback):
            raise ValueError(
                f"{type(other).__name__} must stand before {name} in Trainer(callbacks=[...]), so that every average "
                f"is projected right after it was made."
            )


def averaged_modules(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the averaged copies that Lightning's callbacks hold, with the LightningModule's own parameter names."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            yield callback._average_model.module
