"""Samples that leave a network early, from plain functions to a wrapper and a network that skips its rest."""

from __future__ import annotations

from lightning_compress.early_exit.calibration import Outcome, Table, calibrate, evaluate, fit_temperatures, q_sweep
from lightning_compress.early_exit.network import EarlyExitNetwork
from lightning_compress.early_exit.placing import Candidate, exit_candidates, place_exits
from lightning_compress.early_exit.rules import ExitRule, exit_costs, leaves, score

__all__ = [
    "Candidate",
    "EarlyExitNetwork",
    "ExitRule",
    "Outcome",
    "Table",
    "calibrate",
    "evaluate",
    "exit_candidates",
    "exit_costs",
    "fit_temperatures",
    "leaves",
    "place_exits",
    "q_sweep",
    "score",
]
