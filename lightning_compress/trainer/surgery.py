"""Change a module's shapes while a Trainer holds it, and the base class of callbacks that do so."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_compress.channels.load import follow_checkpoints, follow_leader, with_record
from lightning_compress.channels.optimizer_state import check_state, forget_unsliceable
from lightning_compress.core.tensors import Kept
from lightning_compress.trainer.averages import averaged_modules, copies_inside
from lightning_compress.trainer.callback import CompressionCallback, techniques
from lightning_compress.trainer.unwrap import innermost

_TO_SHRINK = (
    "Once it is loaded, lightning_compress.shrink(network, example_inputs) takes them out; trainer.test(module) "
    "without ckpt_path tests the network as the fit left it."
)


class Cut(Protocol):
    """A function that cuts the network of a fit and its copies, and returns the positions that stay."""

    def __call__(self, *, optimizers: list[torch.optim.Optimizer], copies: list[nn.Module]) -> Kept: ...


class CuttingCallback(CompressionCallback):
    """A technique that may take channels out of the network: `cut_in_fit` does so, and its checkpoints may be thin.

    Attributes:
        removes: Whether channels leave the network; a subclass sets it.
    """

    removes = False
    _n_parameters_left: int | None = None  # once channels have left at a fit's end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.removes:
            # The module, and averages of it, take the shapes of checkpoints, which may hold a thinner or wider network.
            follow_checkpoints(pl_module)
            for average in averaged_modules(trainer):
                follow_leader(average, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.removes:
            keep_metadata(checkpoint, pl_module)

    def cut_in_fit(self, trainer: Trainer, cut: Cut, *, at_end: bool) -> None:
        """Cut the network that is being trained: its optimizers, averages, wrapper and other callbacks follow.

        At the fit's end an optimizer's state that cannot be cut is forgotten, for no step follows; a warning says so.
        """
        for optimizer in trainer.optimizers if at_end else ():
            if reason := forget_unsliceable(optimizer, trainer.lightning_module.parameters()):
                warnings.warn(
                    f"{reason} The fit is over, so this state is forgotten: a fit that is resumed from a later "
                    f"checkpoint starts it anew.",
                    stacklevel=2,
                )
        with rewrapped(trainer):
            copies = [*averaged_modules(trainer), *copies_inside(innermost(trainer.lightning_module))]
            kept = cut(optimizers=trainer.optimizers, copies=copies)
        for other in techniques(trainer) if kept else ():
            if other is not self:
                other.follow_cut(trainer, trainer.lightning_module, kept)
        if at_end:
            self._n_parameters_left = _count(trainer.lightning_module)
            files = [one.best_model_path for one in trainer.callbacks if isinstance(one, ModelCheckpoint)]  # type: ignore[attr-defined]
            if kept and any(files):
                rank_zero_info(
                    f"Channels have left the network at the fit's end; {', '.join(filter(None, files))} is of before "
                    f"and holds it with masked channels. {_TO_SHRINK}"
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._warn_if_wide(pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_if_wide(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_if_wide(pl_module)

    def _warn_if_wide(self, pl_module: LightningModule) -> None:
        """Warn where a checkpoint of before the cut has been loaded back, as by `trainer.test(ckpt_path="best")`."""
        left, found = self._n_parameters_left, _count(pl_module)
        if left is not None and found > left:
            warnings.warn(
                f"The network has {found} parameters, and had {left} when channels had left at the fit's end: a "
                f"checkpoint of before, with masked channels, has been loaded. {_TO_SHRINK}",
                stacklevel=2,
            )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def keep_metadata(checkpoint: dict[str, Any], pl_module: LightningModule) -> None:
    """Write the module's records into a checkpoint whose state dict, from an average, has none."""
    checkpoint["state_dict"] = with_record(checkpoint["state_dict"], pl_module)


def check_cuts_in_fit(trainer: Trainer, parameters: Iterable[nn.Parameter]) -> None:
    """Raise a ValueError if the optimizer state of parameters that will be cut can't be sliced."""
    parameters = list(parameters)
    for optimizer in trainer.optimizers:
        check_state(optimizer, parameters)


@contextmanager
def rewrapped(trainer: Trainer) -> Iterator[None]:
    """Unwrap the module from DistributedDataParallel, and wrap it anew after the block: a reducer keeps old shapes."""
    strategy = trainer.strategy
    wrapped = isinstance(strategy, DDPStrategy) and strategy.model is not trainer.lightning_module
    if wrapped:
        strategy.model = trainer.lightning_module
    try:
        yield
    finally:
        if wrapped:
            assert isinstance(strategy, DDPStrategy)
            strategy.configure_ddp()
