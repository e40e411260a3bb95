"""The user's own module, inside what this package wraps around it."""

from __future__ import annotations

from lightning.pytorch import LightningModule

LOGGED = "compress/"  # begins the name of every number that this package logs, so that it meets none of the user's
SLOT = "_lightning_compress"  # of a wrapper: what it holds, see `CompressionModule`


def innermost(module: LightningModule) -> LightningModule:
    """Return the user's own module, the same for all wrappers around it."""
    slot = getattr(type(module), SLOT, None)
    own: LightningModule = module if slot is None else slot.__get__(module).own
    return own
