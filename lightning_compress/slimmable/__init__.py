"""Slimmable networks: one network that runs at any width."""

from lightning_compress.slimmable.recalibrate import recalibrate

__all__ = ["recalibrate"]
