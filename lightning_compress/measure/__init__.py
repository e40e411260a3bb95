"""Measures the costs of a network: parameters, multiply-accumulates, latency and memory."""

from __future__ import annotations

from lightning_compress.measure.footprint import Footprint, Latency, compare_latency, measure
from lightning_compress.measure.macs import count_macs

__all__ = ["Footprint", "Latency", "compare_latency", "count_macs", "measure"]
