"""Collect the outputs of all exits for the samples of a loader, by the module's own validation step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.trainer.labels import targets_of
from lightning_compress.trainer.quiet import validate_quietly


@dataclass
class Collected:
    """Outputs by exit, the last one the full network's, with the targets; on the CPU, in float32.

    Attributes:
        inputs: What the network was called with for the first batch.
    """

    logits: list[list[Tensor]] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    inputs: ExampleInputs | None = None

    def outputs(self) -> list[Tensor]:
        """Return one tensor for each exit."""
        return [torch.cat(some) for some in zip(*self.logits, strict=True)]


def collect(
    module: LightningModule,
    objective: Any,
    loader: Any,
    *,
    targets: Callable[[Any], Tensor] | None,
    trainer: Trainer | None,
) -> Collected:
    """Run the module's validation step over a loader, with its transforms, precision and device; nothing is logged.

    Args:
        module: The wrapper.
        objective: Its objective, whose `collecting` is called in each step.
        loader: Of samples that the network was not trained on; or a LightningDataModule.
        targets: Picks the targets of a batch; by default its last part, or what it has under a name such as "labels".
        trainer: Runs the validation; None: one of the same accelerator that reports nothing.

    Raises:
        ValueError: The module has no validation step, the loader no batch, or the targets can't be told.
    """
    found = Collected()
    pick = targets or targets_of

    def keep(batch: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]], logits: Sequence[Tensor]) -> None:
        found.logits.append([one.detach().float().cpu() for one in logits])
        found.targets.append(pick(batch).detach().cpu())
        if found.inputs is None:
            args, kwargs = inputs
            if args and kwargs:
                raise ValueError(
                    "The network is called with positional and with keyword arguments, from which no example inputs "
                    "can be made: call it with one kind."
                )
            found.inputs = kwargs or args

    objective.collecting = keep
    try:
        validate_quietly(module, loader, trainer)
    finally:
        objective.collecting = None
    if not found.logits:
        raise ValueError(
            f"The validation_step of {type(module).__name__} did not call the network for any batch of the loader: "
            f"there is nothing to calibrate with."
        )
    return found


def trained_on(module: LightningModule, loader: Any) -> bool:
    """Whether a loader has samples of the loader of the module's last fit."""
    trainer = module._trainer
    known = None if trainer is None else trainer.train_dataloader
    return any(_overlap(one.dataset, other.dataset) for one in _loaders(loader) for other in _loaders(known))


def _loaders(found: Any) -> list[DataLoader[Any]]:
    if isinstance(found, DataLoader):
        return [found]
    inside = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else ()
    return [one for some in inside for one in _loaders(some)]


def _overlap(one: Any, other: Any) -> bool:
    if isinstance(one, Subset) and isinstance(other, Subset) and one.dataset is other.dataset:
        return bool(set(one.indices) & set(other.indices))
    bare = [some.dataset if isinstance(some, Subset) else some for some in (one, other)]
    return bare[0] is bare[1]
