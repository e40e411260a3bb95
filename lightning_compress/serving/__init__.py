"""Serving: a network that can be run in several ways, within a budget that changes."""

from __future__ import annotations

from lightning_compress.serving.controller import BudgetController, Served
from lightning_compress.serving.settings import Setting, measured_settings

__all__ = ["BudgetController", "Served", "Setting", "measured_settings"]
