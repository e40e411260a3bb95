"""Inputs with which a network is traced and timed: its own example, or training samples."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_compress.core.example_inputs import ExampleInputs, first_samples, to_device
from lightning_compress.trainer.inputs import inputs_of


def example_inputs(module: LightningModule, datamodule: LightningDataModule, *, batch_size: int) -> ExampleInputs:
    """Return the module's `example_input_array`, or else the first training samples, at most `batch_size` of them.

    The data module must be set up for training.

    Raises:
        ValueError: It is not clear which part of a batch is the network's input.
    """
    given: ExampleInputs | None = module.example_input_array
    return samples(module, datamodule, batch_size=batch_size) if given is None else given


def samples(
    module: LightningModule, datamodule: LightningDataModule, *, batch_size: int, test: bool = False
) -> ExampleInputs:
    """Return the inputs of the first training samples, at most `batch_size` of them and at most one batch.

    The data module must be set up for training; for the first test samples, with `test`, for testing.

    Raises:
        ValueError: It is not clear which part of a batch is the network's input.
    """
    loader = datamodule.test_dataloader() if test else datamodule.train_dataloader()
    loader = loader[0] if isinstance(loader, list | tuple) else loader
    inputs: Any = inputs_of(next(iter(loader)), module, partial(to_device, device=module.device))
    return first_samples(inputs, batch_size)
