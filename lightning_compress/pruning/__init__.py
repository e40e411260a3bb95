"""Iterative pruning of weights and channels, as plain functions and as a callback."""

from __future__ import annotations

from lightning_compress.pruning.channels import find_channels
from lightning_compress.pruning.inspection import inspect_channels, inspect_weights
from lightning_compress.pruning.masked import MaskedParameters
from lightning_compress.pruning.masks import prune_channels, prune_weights

__all__ = [
    "MaskedParameters",
    "find_channels",
    "inspect_channels",
    "inspect_weights",
    "prune_channels",
    "prune_weights",
]
