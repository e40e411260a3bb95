"""Pruning: score, remove a little, train on, repeat. From plain functions to a callback."""

from __future__ import annotations

from lightning_compress.pruning.inspection import inspect_neurons, inspect_weights
from lightning_compress.pruning.masked import MaskedParameters
from lightning_compress.pruning.masks import prune_neurons, prune_weights
from lightning_compress.pruning.neurons import find_neurons

__all__ = ["MaskedParameters", "find_neurons", "inspect_neurons", "inspect_weights", "prune_neurons", "prune_weights"]
