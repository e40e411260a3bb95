"""Return the user's own module and optimizer from inside the wrappers of this package and of Lightning."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer

LOGGED = "compress/"  # prefix of the names that this package logs, which keeps them apart from the user's
SLOT = "_lightning_compress"  # attribute of a wrapper with the module inside, see `CompressionModule`


def innermost(module: LightningModule) -> LightningModule:
    """Return the user's own module, which is inside all wrappers."""
    slot = getattr(type(module), SLOT, None)
    own: LightningModule = module if slot is None else slot.__get__(module).own
    return own


def raw_optimizer(optimizer: torch.optim.Optimizer | LightningOptimizer) -> torch.optim.Optimizer:
    """Return the user's own optimizer, without Lightning's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
