"""Change a module's shapes while a Trainer holds it."""

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
from lightning_compress.trainer.callback import TO_SHRINK, CompressionCallback, techniques
from lightning_compress.trainer.unwrap import innermost


class Cut(Protocol):
    """A function that cuts the network of a fit and its copies, and returns the positions that stayed."""

    def __call__(self, *, optimizers: list[torch.optim.Optimizer], copies: list[nn.Module]) -> Kept: ...


def cut_in_fit(trainer: Trainer, callback: CompressionCallback, cut: Cut, *, at_end: bool) -> None:
    """Cut the network that is being trained: its optimizers, averages, wrapper and other callbacks follow.

    At the fit's end an optimizer's state that cannot be cut is forgotten, for no step follows; a warning says so.
    """
    for optimizer in trainer.optimizers if at_end else ():
        if reason := forget_unsliceable(optimizer, trainer.lightning_module.parameters()):
            warnings.warn(
                f"{reason} The fit is over, so this state is forgotten: a fit that is resumed from a later checkpoint "
                f"starts it anew.",
                stacklevel=2,
            )
    with rewrapped(trainer):
        copies = [*averaged_modules(trainer), *copies_inside(innermost(trainer.lightning_module))]
        kept = cut(optimizers=trainer.optimizers, copies=copies)
    for other in techniques(trainer) if kept else ():
        if other is not callback:
            other.follow_cut(trainer, trainer.lightning_module, kept)
    if at_end:
        callback.n_parameters_left = _count(trainer.lightning_module)
        files = [one.best_model_path for one in trainer.callbacks if isinstance(one, ModelCheckpoint)]  # type: ignore[attr-defined]
        if kept and any(files):
            rank_zero_info(
                f"Channels have left the network at the fit's end; {', '.join(filter(None, files))} is of before and "
                f"holds it with masked channels. {TO_SHRINK}"
            )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def follow_loads(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let the module, and averages of it, take the shapes of checkpoints, which may hold a thinner or wider network."""
    follow_checkpoints(pl_module)
    for average in averaged_modules(trainer):
        follow_leader(average, pl_module)


def keep_metadata(checkpoint: dict[str, Any], pl_module: LightningModule) -> None:
    """Write the records of cuts and input hooks into a checkpoint whose state dict, that of an average, has none."""
    checkpoint["state_dict"] = with_record(checkpoint["state_dict"], pl_module)


def check_cuts_in_fit(trainer: Trainer, parameters: Iterable[nn.Parameter]) -> None:
    """Raise a ValueError if an optimizer's state of parameters that are to be cut could not be sliced."""
    parameters = list(parameters)
    for optimizer in trainer.optimizers:
        check_state(optimizer, parameters)


@contextmanager
def rewrapped(trainer: Trainer) -> Iterator[None]:
    """Take the module out of its DistributedDataParallel wrapper, and wrap it anew: a reducer keeps the old shapes."""
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
