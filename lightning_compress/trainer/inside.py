"""The user's own module, inside what this package wraps around it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule


def inside(module: LightningModule) -> LightningModule | None:
    """Return what a wrapper of this package holds, None for any other module."""
    level: Any = getattr(module, "_compression", None)  # see `CompressionModule`
    found: LightningModule | None = None if level is None else level.wrapped
    return found


def innermost(module: LightningModule) -> LightningModule:
    """Return the module without the wrappers around it: the same for all wrappers of one module."""
    while (next_one := inside(module)) is not None:
        module = next_one
    return module


def depth(module: LightningModule) -> int:
    """Return how many wrappers there are around the user's own module."""
    below = inside(module)
    return 0 if below is None else 1 + depth(below)
