"""The user's own module and optimizer, inside what this package and Lightning wrap around them."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer

LOGGED = "compress/"  # begins the name of every number that this package logs, so that it meets none of the user's
SLOT = "_lightning_compress"  # of a wrapper: what it holds, see `CompressionModule`


def innermost(module: LightningModule) -> LightningModule:
    """Return the user's own module, the same for all wrappers around it."""
    slot = getattr(type(module), SLOT, None)
    own: LightningModule = module if slot is None else slot.__get__(module).own
    return own


def raw_optimizer(optimizer: torch.optim.Optimizer | LightningOptimizer) -> torch.optim.Optimizer:
    """Return the user's own optimizer, without Lightning's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
