"""The ways in which one trained network can be run: leaving at some exit, within some budget, at some width."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class OperatingPoint:
    """One way to run a network.

    Attributes:
        name: Its name in reports.
        network: A module that is called as the network is, and does only what this point needs; to be timed.
        answering: While its block lasts, the module's own validation and test steps get this point's outputs.
    """

    name: str
    network: nn.Module
    answering: Callable[[], AbstractContextManager[None]]
