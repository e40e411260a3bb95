"""Samples that leave a network early, from plain functions to a wrapper and a network that skips its rest."""

from __future__ import annotations

from lightning_compress.early_exit.network import EarlyExitNetwork
from lightning_compress.early_exit.rules import ExitRule, exit_costs, leaves, score, streak

__all__ = ["EarlyExitNetwork", "ExitRule", "exit_costs", "leaves", "score", "streak"]
