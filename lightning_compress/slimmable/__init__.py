"""Slimmable networks: one network that runs at any width."""

from lightning_compress.core.recalibrate import recalibrate
from lightning_compress.slimmable.found import FoundWidths
from lightning_compress.slimmable.network import SlimmableNetwork, extract
from lightning_compress.slimmable.norms import give_norms
from lightning_compress.slimmable.order import sort_channels
from lightning_compress.slimmable.search import search_widths
from lightning_compress.slimmable.switch import set_width
from lightning_compress.slimmable.thin import ThinNetwork

__all__ = [
    "FoundWidths",
    "SlimmableNetwork",
    "ThinNetwork",
    "extract",
    "give_norms",
    "recalibrate",
    "search_widths",
    "set_width",
    "sort_channels",
]
