"""Slimmable networks: one network that runs at any width."""

from lightning_compress.slimmable.recalibrate import recalibrate
from lightning_compress.slimmable.search import FoundWidths, search_widths

__all__ = ["FoundWidths", "recalibrate", "search_widths"]
