"""Return the user's own module and optimizer from inside the wrappers of this package and of Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

T = TypeVar("T")
LOGGED = "compress/"  # prefix of the names that this package logs, which keeps them apart from the user's
SLOT = "_lightning_compress"  # attribute of a wrapper with the module inside, see `CompressionModule`


def innermost(module: LightningModule) -> LightningModule:
    """Return the user's own module, which is inside all wrappers."""
    slot = getattr(type(module), SLOT, None)
    own: LightningModule = module if slot is None else slot.__get__(module).own
    return own


def objective_of(module: LightningModule, kind: type[T]) -> T:
    """Return the objective of the outermost wrapper whose objective is of a kind."""
    levels: Any = getattr(module, SLOT).levels
    return next(level.objective for level in reversed(levels) if isinstance(level.objective, kind))


def parameters_of(module: LightningModule, part: nn.Module | None) -> dict[str, nn.Parameter]:
    """Return the parameters of a part of the user's module that train, by their names in it; none without a part."""
    ids = set() if part is None else {id(one) for one in part.parameters() if one.requires_grad}
    return {name: one for name, one in innermost(module).named_parameters() if id(one) in ids}


@contextmanager
def without_trainer(module: LightningModule) -> Iterator[None]:
    """Hide a module's Trainer while the block copies the module, which would copy it as well."""
    was, module._trainer = module._trainer, None
    try:
        yield
    finally:
        module._trainer = was


def raw_optimizer(optimizer: torch.optim.Optimizer | LightningOptimizer) -> torch.optim.Optimizer:
    """Return the user's own optimizer, without Lightning's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
