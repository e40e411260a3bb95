"""Inputs with which a network is traced and timed: its own example, or training samples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_compress.core.example_inputs import ExampleInputs, to_device
from lightning_compress.core.example_inputs import batch_size as batched
from lightning_compress.trainer.inputs import inputs_of


def example_inputs(module: LightningModule, datamodule: LightningDataModule, *, batch_size: int) -> ExampleInputs:
    """Return the module's `example_input_array`, or else the first training samples, at most `batch_size` of them.

    The data module must be set up for training.

    Raises:
        ValueError: It is not clear which part of a batch is the network's input.
    """
    given: ExampleInputs | None = module.example_input_array
    return samples(module, datamodule, batch_size=batch_size) if given is None else given


def samples(module: LightningModule, datamodule: LightningDataModule, *, batch_size: int) -> ExampleInputs:
    """Return the inputs of the first training samples, at most `batch_size` of them and at most one batch.

    The data module must be set up for training.

    Raises:
        ValueError: It is not clear which part of a batch is the network's input.
    """
    loader = datamodule.train_dataloader()
    loader = loader[0] if isinstance(loader, list | tuple) else loader
    inputs: Any = inputs_of(next(iter(loader)), module, partial(to_device, device=module.device))
    n = batched(inputs)

    def first(leaf: Any) -> Any:
        return leaf[:batch_size] if isinstance(leaf, Tensor) and leaf.shape[:1] == (n,) else leaf

    few: ExampleInputs = tree_map(first, dict(inputs) if isinstance(inputs, Mapping) else inputs)
    return few
