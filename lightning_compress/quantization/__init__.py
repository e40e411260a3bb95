"""Quantization of weights and inputs to a few bits. These functions need no Trainer."""

from __future__ import annotations

from lightning_compress.quantization.grids import on_symmetric_grid, weight_scales
from lightning_compress.quantization.input_grids import InputGrid, input_grids, quantize_inputs
from lightning_compress.quantization.weights import UniformWeights, quantize_weights

__all__ = [
    "InputGrid",
    "UniformWeights",
    "input_grids",
    "on_symmetric_grid",
    "quantize_inputs",
    "quantize_weights",
    "weight_scales",
]
