"""Change the shapes of a module during a fit, and the base class of the callbacks that do so."""

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
    "After loading it, cut them out by lightning_compress.shrink(network, example_inputs). To test the network that "
    "the fit has cut, call trainer.test(module) without ckpt_path."
)


class Cut(Protocol):
    """A function that cuts the network of a fit and its copies, and returns the positions that stay."""

    def __call__(self, *, optimizers: list[torch.optim.Optimizer], copies: list[nn.Module]) -> Kept: ...


class CuttingCallback(CompressionCallback):
    """A technique that may cut channels out of the network by `cut_in_fit`, so that its checkpoints may be thin.

    Attributes:
        removes: Whether this callback cuts channels out; a subclass sets it.
    """

    removes = False
    _n_parameters_left: int | None = None  # set when channels were cut out at a fit's end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.removes:
            # The module and its averages take the shapes of loaded checkpoints, which may hold other networks than now.
            _follow_checkpoints(pl_module)
            for average in averaged_modules(trainer):
                follow_leader(average, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.removes:
            keep_metadata(checkpoint, pl_module)

    def cut_in_fit(self, trainer: Trainer, cut: Cut, *, at_end: bool) -> None:
        """Cut the network of a fit, and with it the optimizers, the averages, the wrapper and other callbacks' state.

        At the fit's end, optimizer state that can't be cut is discarded with a warning, because no step follows.
        """
        for optimizer in trainer.optimizers if at_end else ():
            if reason := forget_unsliceable(optimizer, trainer.lightning_module.parameters()):
                warnings.warn(
                    f"{reason} The fit is over, so this state is discarded: a fit that is resumed from a later "
                    f"checkpoint makes it anew.",
                    stacklevel=2,
                )
        _follow_checkpoints(trainer.lightning_module)  # its children may have been made since `setup`
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
                    f"Channels were cut out of the network at the fit's end, but {', '.join(filter(None, files))} is "
                    f"from before the cut and holds it with masked channels. {_TO_SHRINK}"
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
        """Warn if a checkpoint from before the cut was loaded, as by `trainer.test(ckpt_path="best")`."""
        left, found = self._n_parameters_left, _count(pl_module)
        if left is not None and found > left:
            warnings.warn(
                f"The network has {found} parameters, but {left} after channels were cut out at the fit's end: a "
                f"checkpoint from before, with masked channels, was loaded. {_TO_SHRINK}",
                stacklevel=2,
            )


def _follow_checkpoints(pl_module: LightningModule) -> None:
    """Make a module and its networks take the shapes of loaded state dicts; each of them can be saved by itself."""
    follow_checkpoints(pl_module)
    for child in pl_module.children():
        if any(True for _ in child.children()):
            follow_checkpoints(child)


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
