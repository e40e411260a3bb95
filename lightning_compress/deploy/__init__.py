"""Writes a network to a file that runs without this package: a program of torch.export, or an ONNX file."""

from __future__ import annotations

from lightning_compress.deploy.integers import fold_quantized
from lightning_compress.deploy.onnx_file import save_onnx
from lightning_compress.deploy.program import capture, save_program

__all__ = ["capture", "fold_quantized", "save_onnx", "save_program"]
