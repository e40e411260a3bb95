"""Samples that leave a network early, from plain functions to a wrapper and a network that skips its rest."""

from __future__ import annotations

from lightning_compress.early_exit.network import EarlyExitNetwork
from lightning_compress.early_exit.placing import Candidate, exit_candidates, place_exits
from lightning_compress.early_exit.rules import ExitRule, exit_costs, leaves, score, streak

__all__ = [
    "Candidate",
    "EarlyExitNetwork",
    "ExitRule",
    "exit_candidates",
    "exit_costs",
    "leaves",
    "place_exits",
    "score",
    "streak",
]
