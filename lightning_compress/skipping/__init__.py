"""Skipped blocks: gates decide for each sample which residual blocks of a network run."""

from lightning_compress.skipping.budget import Measured, budget_loss
from lightning_compress.skipping.gates import SkipGates, gates_of, new_gates
from lightning_compress.skipping.network import SkippingNetwork
from lightning_compress.skipping.record import give_gates, take_gates

__all__ = [
    "Measured",
    "SkipGates",
    "SkippingNetwork",
    "budget_loss",
    "gates_of",
    "give_gates",
    "new_gates",
    "take_gates",
]
